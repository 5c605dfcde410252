#!/usr/bin/env bash
# Prints each failed test of a log with the last lines of its output.
#
#   ./scripts/failed-tests.sh SUITE LOG
#
# In a nextest log, a test's output follows its `FAIL` line (profile `ci` prints the output again at
# the end). For any other log, the script prints the last lines.
set -euo pipefail
suite=$1 log=$2
readonly lines=25

plain=$(sed 's/\x1b\[[0-9;]*m//g' "$log")
failed=$(sed -nE 's/^ +(FAIL|TIMEOUT|SIGNAL|SIGABRT|SIGSEGV|SIGKILL|ABORT) \[[^]]*\] (\([^)]*\) )?(.*)$/\3/p' <<<"$plain" | sort -u)
if [ -z "$failed" ]; then
    printf '\nFAILED: %s\n' "$suite"
    tail -"$lines" <<<"$plain" | sed 's/^/    /'
    exit
fi
while read -r test; do
    printf '\nFAILED: %s: %s\n' "$suite" "$test"
    # The output of the test, up to the next test's line.
    awk -v test="$test" '
        /^ +[A-Z]+ \[/ || /^────/ { on = 0 }
        /^ +(FAIL|TIMEOUT|SIG[A-Z]+|ABORT) \[/ && index($0, test) { on = 1; n = 0; next }
        on && NF { kept[n++] = $0 }
        END { for (i = (n > '"$lines"' ? n - '"$lines"' : 0); i < n; i++) print "    " kept[i] }' <<<"$plain"
done <<<"$failed"
