"""What a recipe holds, and how faults in it are explained."""
