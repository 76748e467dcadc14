"""How knowledge crosses from the teachers to the student: standardize, align, project, compare, balance."""
