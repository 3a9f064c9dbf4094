"""The shipped acceptance suite: criteria judge what the report says, thin tests hand them the report.

thresholds   every limit, with its source
playbook     what to do where one does not pass;   shown  verdicts beside what is known of their criteria
criteria/    one pure function a criterion: report → Verdict
test_*.py    one line each; collected by the plugin under `probe-checks/`
"""
