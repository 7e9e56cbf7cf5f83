package cli

import (
	"bytes"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/policy"
)

// explained are answers of each verdict, with the packets they are about.
var explained = []struct {
	q agent.Question
	e agent.Explanation
}{
	{agent.Question{Src: ap("10.0.1.99:50000"), Dst: ap("1.1.1.1:443"), Proto: policy.ProtoTCP},
		agent.Explanation{Verdict: "masquerade", Reason: "masq-new", Match: "10.0.0.0/16", Source: "option pod-cidrs", Device: "eth0", Address: "192.0.2.1", Port: 50000}},
	{agent.Question{Src: ap("[fd00:10::2]:77"), Dst: ap("[2606:4700::1]:0"), Proto: policy.ProtoICMPv6},
		agent.Explanation{Verdict: "masquerade", Reason: "masq-known", Match: "fd00:10::/64", Source: "node n1", Device: "eth0", Address: "2001:db8:2::1", Port: 78}},
	{agent.Question{Src: ap("10.0.1.99:50000"), Dst: ap("1.1.1.1:53"), Proto: policy.ProtoUDP},
		agent.Explanation{Verdict: "masquerade", Reason: "masq-new", Match: "10.0.0.0/16", Source: "option pod-cidrs", Device: "eth0", Address: "192.0.2.1",
			Notes: []string{"netfilter chooses the port when the packet comes: 50000 if it is free and among those it may take, else another of 32768-65535"}}},
	{agent.Question{Src: ap("10.0.1.99:50000"), Dst: ap("198.51.100.7:443"), Proto: policy.ProtoTCP},
		agent.Explanation{Verdict: "pass", Reason: "pass-nonmasq", Match: "198.51.100.0/24", Source: "file /etc/config/ip-masq-agent", Device: "eth0"}},
	{agent.Question{Src: ap("10.0.1.99:50000"), Dst: ap("192.0.2.1:443"), Proto: policy.ProtoTCP},
		agent.Explanation{Verdict: "pass", Reason: "pass-device", Source: "option devices", Device: "lo",
			Notes: []string{"the destination is an address of this node", "lo is no masquerade device; those are: eth0, eth1"}}},
	{agent.Question{Src: ap("10.0.1.99:50000"), Dst: ap("1.1.1.1:443"), Proto: policy.ProtoTCP},
		agent.Explanation{Verdict: "pass", Reason: "pass-device", Device: "eth0", Notes: []string{"no device masquerades now: `bauta status` says why"}}},
	{agent.Question{Src: ap("192.0.2.1:50000"), Dst: ap("1.1.1.1:443"), Proto: policy.ProtoTCP},
		agent.Explanation{Verdict: "pass", Reason: "pass-host", Match: "192.0.2.1/32", Device: "eth0"}},
	{agent.Question{Src: ap("10.0.1.99:50000"), Dst: ap("1.1.1.1:443"), Proto: policy.ProtoTCP},
		agent.Explanation{Verdict: "pass", Device: "eth0", Notes: []string{"netfilter knows the connection and does not translate it"}}},
	{agent.Question{Src: ap("10.0.1.99:50000"), Dst: ap("1.1.1.1:443"), Proto: policy.ProtoTCP},
		agent.Explanation{Verdict: "drop", Reason: "drop-no-port", Match: "10.0.0.0/16", Source: "option pod-cidrs", Device: "eth0"}},
}

func TestExplainText(t *testing.T) {
	var b strings.Builder
	for _, x := range explained {
		b.WriteString(explainText(x.q, x.e) + "\n")
	}
	golden(t, "testdata/golden/explain.txt", b.String())
}

func TestExplainJSON(t *testing.T) {
	var out bytes.Buffer
	a := &app{Env: Env{Stdout: &out}}
	for _, x := range explained {
		if err := a.show(jsonForm, x.e, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.show(yamlForm, explained[0].e, nil); err != nil {
		t.Fatal(err)
	}
	golden(t, "testdata/golden/explain.json", out.String())
}
