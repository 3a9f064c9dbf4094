"""The shipped acceptance suite: criteria judge what the report says, thin tests hand them the report.

thresholds   every limit, with its source
criteria/    one pure function a criterion: report → Verdict
test_*.py    one line each; collected by the plugin under `probe-checks/`
"""
