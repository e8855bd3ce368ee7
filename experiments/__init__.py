"""Ablations of linear token mixers: data, teacher, distillation, evaluation, report."""
