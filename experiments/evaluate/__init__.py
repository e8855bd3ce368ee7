"""What is measured of a student: agreement with its teacher, pictures, mixing matrices, time and memory."""
