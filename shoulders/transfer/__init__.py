"""From teacher features to the student's loss: standardize, align, project, compare, balance."""
