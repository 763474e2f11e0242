"""Fits that need the corrected run itself: TAC, StepbaQ."""
