"""One pure function a criterion, report → Verdict, one file a family."""
