package agent

import (
	"net/netip"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/policy"
)

// The origin is one of the four forms of the contract, or none.
func TestExplainOrigin(t *testing.T) {
	t.Parallel()
	for from, want := range map[string]string{
		"option pod-cidrs": "option pod-cidrs", "file /etc/nodes": "file /etc/nodes", "node n1": "node n1", "default": "default",
		"device": "", "device eth0": "", "pinned": "", "": "",
	} {
		if got := origin(from); got != want {
			t.Errorf("origin %q: %q, want %q", from, got, want)
		}
	}
}

// What the kernel alone can know is no contradiction to policy.json; another decision is.
func TestExplainConclude(t *testing.T) {
	t.Parallel()
	src := netip.MustParseAddrPort("10.0.1.2:50000")
	file := &PolicyFile{Sources: []policy.Rule{{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Origin: "option pod-cidrs"}, {Prefix: netip.MustParsePrefix("10.0.1.0/24"), Origin: "node n1"}}}
	listed, inKernel := netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("192.0.0.0/16")
	excluded := policy.Decision{Outcome: policy.PassNonMasq, Match: listed, Origin: "file list"}
	masquerade := policy.Decision{Outcome: policy.MasqNew}
	for _, c := range []struct {
		name    string
		kernel  policy.Outcome
		says    policy.Decision
		missing bool // policy.json
		want    Explanation
		notes   int
	}{
		{"the same", policy.PassNonMasq, excluded, false, Explanation{Verdict: "pass", Reason: "pass-nonmasq", Match: "192.0.2.0/24", Source: "file list"}, 0},
		{"no file", policy.PassNonMasq, policy.Decision{}, true, Explanation{Verdict: "pass", Reason: "pass-nonmasq", Match: "192.0.0.0/16"}, 0},
		{"another", policy.PassNonMasq, masquerade, false, Explanation{Verdict: "pass", Reason: "pass-nonmasq", Match: "192.0.0.0/16"}, 1},
		{"another the other way round", policy.MasqNew, excluded, false, Explanation{Verdict: "masquerade", Reason: "masq-new", Match: "192.0.0.0/16"}, 1},
		{"new", policy.MasqNew, masquerade, false, Explanation{Verdict: "masquerade", Reason: "masq-new", Match: "10.0.1.0/24", Source: "node n1"}, 0},
		{"known", policy.MasqKnown, masquerade, false, Explanation{Verdict: "masquerade", Reason: "masq-known", Match: "10.0.1.0/24", Source: "node n1"}, 0},
		{"known, excluded meanwhile", policy.MasqKnown, excluded, false, Explanation{Verdict: "masquerade", Reason: "masq-known"}, 1},
		{"no room", policy.DropTableFull, masquerade, false, Explanation{Verdict: "drop", Reason: "drop-table-full", Match: "10.0.1.0/24", Source: "node n1"}, 0},
		{"from outside", policy.PassInbound, masquerade, false, Explanation{Verdict: "pass", Reason: "pass-inbound"}, 0},
		{"off", policy.PassDisabled, policy.Decision{Outcome: policy.PassDisabled, Origin: "option enable-ipv4-masquerade"}, false,
			Explanation{Verdict: "pass", Reason: "pass-disabled", Source: "option enable-ipv4-masquerade"}, 0},
	} {
		x := explainer{q: Question{Src: src}, file: file, decision: c.says}
		if c.missing {
			x.file = nil
		}
		err := x.conclude(c.kernel, func(policy.Outcome) (netip.Prefix, error) { return inKernel, nil })
		got := x.Explanation
		notes := got.Notes
		got.Notes = nil
		if err != nil || got.Verdict != c.want.Verdict || got.Reason != c.want.Reason || got.Match != c.want.Match || got.Source != c.want.Source || len(notes) != c.notes {
			t.Errorf("%s: %v, %+v, notes %q, want %+v and %d notes", c.name, err, got, notes, c.want, c.notes)
		}
	}
}

// Without a device that masquerades it is not the option that says so: the agent may wait.
func TestExplainElsewhere(t *testing.T) {
	t.Parallel()
	x := explainer{}
	x.Device = "eth0"
	x.elsewhere()
	if x.Source != "" || len(x.Notes) != 1 || !strings.Contains(x.Notes[0], "bauta status") {
		t.Errorf("none attached: %+v", x.Explanation)
	}
	x = explainer{attached: []datapath.Attachment{{Device: "eth1"}}}
	x.Device = "eth0"
	x.elsewhere()
	if x.Source != "option devices" || len(x.Notes) != 1 || !strings.HasSuffix(x.Notes[0], "those are: eth1") {
		t.Errorf("another one attached: %+v", x.Explanation)
	}
}
