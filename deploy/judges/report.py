"""How every judge reports: each check on a line of its own, all of them, exit status 1 when one failed."""

import sys


class Report:
    """Collects checks; a judge that has checked nothing has failed too."""

    def __init__(self, subject):
        self.subject = subject
        self.passed = 0
        self.failed = 0

    def check(self, ok, what, detail=""):
        """Notes that `what` holds, or that it does not, with the evidence."""
        if ok:
            self.passed += 1
            print(f"  ok    {what}")
        else:
            self.failed += 1
            print(f"  FAIL  {what}")
            for line in str(detail).rstrip().splitlines():
                print(f"        {line}")
        sys.stdout.flush()
        return bool(ok)

    def none(self, rows, what, limit=10):
        """Notes that there are no `rows` of counter-evidence, or shows the first of them."""
        shown = [str(row) for row in rows[:limit]]
        if len(rows) > limit:
            shown.append(f"... and {len(rows) - limit} more")
        return self.check(not rows, what, "\n".join(shown))

    def finish(self):
        """Prints the verdict; the exit status."""
        verdict = "ok" if self.failed == 0 and self.passed > 0 else "FAILED"
        print(f"{self.subject}: {verdict}, {self.passed} checks passed, {self.failed} failed", flush=True)
        return 0 if verdict == "ok" else 1
