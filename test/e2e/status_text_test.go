package e2e_test

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
)

// statusLine is the first line of the text form.
func (n *node) statusLine() string {
	n.t.Helper()
	r := n.try("status")
	if r.code != 0 && r.code != 3 || r.stderr != "" {
		n.t.Errorf("status: %+v", r)
	}
	line, _, _ := strings.Cut(r.stdout, "\n")
	return line
}

// The line that users of Cilium grep for, in its forms, with the agent and without.
func TestStatusLine(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{SecondUplink: true})
	list := n.writeList("198.51.100.0/24")
	for _, c := range []struct {
		args []string
		line string
	}{
		{[]string{"--pod-cidrs=10.0.1.0/24", "--devices=eth0,eth1", "--enable-ip-masq-agent", "--ip-masq-agent-config-path=" + list,
			"--ipv4-native-routing-cidr=10.0.0.0/16", "--enable-ipv6-masquerade=false"},
			"BPF (ip-masq-agent)   [eth0, eth1]   10.0.0.0/16 [IPv4: Enabled, IPv6: Disabled]"},
		{[]string{podCIDRs, "--devices=eth0", "--enable-ip-masq-agent", "--ip-masq-agent-config-path=" + list},
			"BPF (ip-masq-agent)   [eth0]   - [IPv4: Enabled, IPv6: Enabled]"},
		{[]string{podCIDRs, "--devices=eth0", "--ipv4-native-routing-cidr=172.16.0.0/12 10.0.0.0/8", "--ipv6-native-routing-cidr=fd00::/16"},
			"BPF   [eth0]   10.0.0.0/8 172.16.0.0/12 fd00::/16 [IPv4: Enabled, IPv6: Enabled]"},
	} {
		n.start(c.args...)
		want := "Masquerading:   " + n.line(c.line)
		if line := n.statusLine(); line != want {
			t.Errorf("%q, want %q", line, want)
		}
		n.stop()
		if line := n.statusLine(); line != want {
			t.Errorf("with the agent down: %q, want %q", line, want)
		}
	}
}

// keys of an object.
func keys(t testing.TB, data json.RawMessage) []string {
	t.Helper()
	var m map[string]json.RawMessage
	must(t, json.Unmarshal(data, &m))
	var names []string
	for k := range m {
		names = append(names, k)
	}
	slices.Sort(names)
	return names
}

// The objects and keys of the contract, whatever state the agent is in.
func TestStatusJSON(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	check := func(when string) {
		t.Helper()
		var st map[string]json.RawMessage
		n.cliJSON(&st, "status")
		for _, key := range []string{"masquerading", "agent", "devices", "sources", "ipMasqAgent", "nodes", "flows", "ports", "drops", "warnings"} {
			if st[key] == nil {
				t.Errorf("%s: no key %s", when, key)
			}
		}
		want := []string{"enabled", "enabledProtocols", "ip-masq-agent", "mode", "snat-exclusion-cidr-v4", "snat-exclusion-cidr-v6"}
		if got := keys(t, st["masquerading"]); !slices.Equal(got, want) {
			t.Errorf("%s: masquerading has %q, want %q", when, got, want)
		}
		for key, first := range map[string]byte{"devices": '[', "warnings": '[', "drops": '{', "flows": '{'} {
			if v := st[key]; len(v) == 0 || v[0] != first {
				t.Errorf("%s: %s is %s", when, key, v)
			}
		}
		out := n.try("status", "-o", "yaml").stdout
		if !strings.Contains("\n"+out, "\nmasquerading:\n") || !strings.Contains(out, "snat-exclusion-cidr-v4: 10.0.1.0/24\n") {
			t.Errorf("%s: YAML:\n%s", when, out)
		}
	}
	wantError(t, n.try("status"), 1, "no agent and no data plane", "hint: bauta agent", "hint: --run-dir")
	wantError(t, n.try("status", "--brief"), 1, "no agent and no data plane")
	wantError(t, n.try("bpf", "nat", "list"), 1, n.bpfRoot, "no data plane", "hint: --bpf-root")
	wantError(t, n.try("bpf", "ipmasq", "list"), 1, n.bpfRoot)
	wantError(t, n.try("bpf", "node", "list"), 1, n.bpfRoot)
	wantError(t, n.try("bpf", "nat", "flush"), 1, n.bpfRoot)

	n.start(podCIDRs)
	check("running")
	var st agent.Status
	n.cliJSON(&st, "status")
	m := st.Masquerading
	if !m.Enabled || !m.EnabledProtocols.IPv4 || m.Mode != n.mode() || m.IPMasqAgent || m.SNATExclusionCIDRv4 != "10.0.1.0/24" || m.SNATExclusionCIDRv6 != "fd00:1::/64" {
		t.Errorf("%+v", m)
	}
	info, err := os.Stat(filepath.Join(n.runDir, "policy.json"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("policy.json: %v %v", info, err)
	}
	if info, err := os.Stat(filepath.Join(n.runDir, "agent.sock")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("agent.sock: %v %v", info, err)
	}

	n.kill()
	check("down")
	if st := n.state(); st.Agent.State != agent.Down || st.Agent.PID != n.agent.cmd.Process.Pid || len(st.Devices) != 1 ||
		st.Devices[0].State != agent.DeviceAttached || st.Devices[0].IPv4 != n.NodeAddr.V4 {
		t.Errorf("down: %+v %+v", st.Agent, st.Devices)
	}
	wantBrief(t, n, "agent down")

	must(t, os.Remove(filepath.Join(n.runDir, "policy.json")))
	r := n.try("status")
	if r.code != 3 || !strings.Contains(r.stdout, "policy.json") || !n.lineNames(r.stdout, "[eth0]") {
		t.Errorf("without policy.json: exit %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	must(t, os.WriteFile(filepath.Join(n.runDir, "policy.json"), []byte("{"), 0o600))
	if r := n.try("status"); r.code != 3 || !strings.Contains(r.stdout, "policy.json") {
		t.Errorf("with half a policy.json: exit %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	n.start(podCIDRs)
	n.awaitOK()
	check("started again")
}

// Lists read what is pinned, with the agent and without.
func TestListsWithAgentDown(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	n.start(podCIDRs, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+n.writeList("198.51.100.0/24", "2001:db8:99::/64"),
		"--nodes-file="+n.write("nodes", "192.0.2.77 node7 ExternalIP\n"))
	up := n.tapWorld()
	up.want(n.WorldAddr.V4, n.NodeAddr.V4)
	lists := func() (out string) {
		for _, args := range [][]string{
			{"bpf", "ipmasq", "list"}, {"bpf", "ipmasq", "ls", "-o", "json"}, {"bpf", "ipmasq", "list", "-o", "yaml"},
			{"bpf", "node", "list"}, {"bpf", "node", "ls", "-o", "json"},
		} {
			out += n.cli(args...)
		}
		return out + withoutAge(n.cli("bpf", "nat", "list", "--proto=udp"))
	}
	running := lists()
	for _, text := range []string{"IP PREFIX/ADDRESS\n169.254.0.0/16\n198.51.100.0/24\n2001:db8:99::/64\nfe80::/10\n",
		"192.0.2.77   node7   ExternalIP", `"address": "192.0.2.77"`, `"node": "node7"`, `"type": "ExternalIP"`, "UDP OUT 10.0.1.2:"} {
		if !strings.Contains(running, text) {
			t.Errorf("%q is missing in:\n%s", text, running)
		}
	}
	n.kill()
	if down := lists(); down != running {
		t.Errorf("with the agent down:\n%swant:\n%s", down, running)
	}
	// What is off is not listed.
	n.start(slices.Concat(n.agent.args, []string{"--enable-ipv6-masquerade=false"})...)
	n.wantList("169.254.0.0/16 198.51.100.0/24")
	up.want(netip.MustParseAddr("2001:db8:99::1"), n.PodAddrs[0].V6)
}
