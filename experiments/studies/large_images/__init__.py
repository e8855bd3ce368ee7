"""Images from 64 to 2048 px with the embedded model: content, time and memory."""
