"""Runs one module of Python's own tests and prints what became of each test, one line each: how it ended, its name, why.

What the tests say as they run goes to standard error. `-u`: everything but what needs a network beyond this machine,
and what takes files of gigabytes.
"""
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

module, report = sys.argv[1], "/tmp/python-suite.xml"
tests = [sys.executable, "-m", "test", "-v", "-u", "all,-network,-urlfetch,-largefile", "--timeout", "1800"]
ran = subprocess.run([*tests, "--junit-xml", report, module], stdin=subprocess.DEVNULL, stdout=sys.stderr)

for case in ElementTree.parse(report).getroot().iter("testcase"):
    ended, why = "passed", ""
    for kind, word in (("error", "failed"), ("failure", "failed"), ("skipped", "skipped")):
        for element in case.iter(kind):
            text = (element.get("message") or "") + (element.text or "")
            ended, why = word, " ".join(text.split())[-300:]
    print(ended, case.get("name"), why, sep="\t")
print("exit", module, ran.returncode, sep="\t")
