"""Student, base and teachers measured on labelled images, all by the same code."""
