package policy_test

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/policy"
)

var update = flag.Bool("update", false, "write docs/outcomes.md instead of comparing it")

const outcomesFile = "../../docs/outcomes.md"

func outcomesMarkdown() string {
	var b strings.Builder
	b.WriteString(`# Outcomes

Every packet that Bauta looks at gets one outcome, and every outcome is counted under its reason. Verdicts: a *pass* leaves the
packet as it is, *masquerade* changes its address, a *hold* keeps it until a packet comes that says more, a *drop* keeps a packet that
had to be masqueraded from leaving with its own address.

<!-- Generated from internal/policy/outcome.go: go test ./internal/policy -run TestOutcomesPage -update -->

| reason | number | verdict | meaning | what to do |
|---|---|---|---|---|
`)
	for _, o := range policy.Outcomes() {
		remedy := o.Remedy
		if remedy == "" {
			remedy = "nothing"
		}
		fmt.Fprintf(&b, "| `%s` | %d | %s | %s | %s |\n", o.Name, o.Outcome, o.Outcome.Verdict(), o.Meaning, remedy)
	}
	return b.String()
}

func TestOutcomesPage(t *testing.T) {
	want := outcomesMarkdown()
	if *update {
		if err := os.WriteFile(outcomesFile, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(outcomesFile)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("docs/outcomes.md is not what outcome.go says; run this test with -update")
	}
}

func TestOutcomes(t *testing.T) {
	prefix := map[policy.Verdict]string{policy.Pass: "pass-", policy.Masquerade: "masq-", policy.Hold: "hold-", policy.Drop: "drop-"}
	names := make(map[string]bool)
	last := policy.Continue
	for _, o := range policy.Outcomes() {
		if o.Outcome <= last || o.Outcome >= policy.OutcomeSlots {
			t.Errorf("%s: number %d comes after %d, of %d", o.Name, o.Outcome, last, policy.OutcomeSlots)
		}
		last = o.Outcome
		if !strings.HasPrefix(o.Name, prefix[o.Outcome.Verdict()]) {
			t.Errorf("%s: verdict %s", o.Name, o.Outcome.Verdict())
		}
		if names[o.Name] || o.Outcome.String() != o.Name {
			t.Errorf("%s: not the only one, or its number is %s", o.Name, o.Outcome)
		}
		names[o.Name] = true
		if o.Meaning == "" || strings.HasSuffix(o.Meaning, ".") || strings.ContainsAny(o.Meaning+o.Remedy, "|\n") {
			t.Errorf("%s: meaning %q, remedy %q: want one line each, no full stop", o.Name, o.Meaning, o.Remedy)
		}
	}
	if got := policy.Outcome(200).String(); got != "outcome-200" {
		t.Errorf("unknown number: %s", got)
	}
	if got := policy.Continue.String(); got != "continue" {
		t.Errorf("Continue: %s", got)
	}
}

// The constants and the table of outcomes stand apart: a constant without its
// line would be shown to users as a number.
func TestEveryConstantIsDocumented(t *testing.T) {
	source, err := os.ReadFile("outcome.go")
	if err != nil {
		t.Fatal(err)
	}
	documented := len(policy.Outcomes())
	constants := 0
	for line := range strings.Lines(string(source)) {
		words := strings.Fields(line)
		if len(words) == 4 && words[1] == "Outcome" && words[2] == "=" && words[0] != "Continue" {
			constants++
		}
	}
	if constants != documented {
		t.Errorf("%d constants, %d documented outcomes", constants, documented)
	}
}
