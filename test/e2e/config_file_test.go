package e2e_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/policy"
)

// Lists as bpf ipmasq list has them.
const (
	linkLocals  = "169.254.0.0/16 fe80::/10"
	allDefaults = "10.0.0.0/8 100.64.0.0/10 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 " +
		"192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 fe80::/10"
	rfc1918 = "10.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.168.0.0/16 fe80::/10"
)

// fileRows are the table of section 5 of the contract. A profile's result is a
// list, "=" for that of cilium, or "!" and what the error says.
var fileRows = []struct {
	name, content            string
	cilium, upstream, strict string
	warning                  string // in profile cilium
	key                      string // that an error names
}{
	{name: "a list", content: "nonMasqueradeCIDRs:\n- 198.51.100.0/24\n- 2001:db8:99::/64\n",
		cilium: "169.254.0.0/16 198.51.100.0/24 2001:db8:99::/64 fe80::/10", upstream: "=", strict: "="},
	{name: "a list with link-local IPv4", content: "nonMasqueradeCIDRs: [198.51.100.0/24]\nmasqLinkLocal: true\n",
		cilium: "198.51.100.0/24 fe80::/10", upstream: "=", strict: "="},
	{name: "a list with link-local IPv6", content: "nonMasqueradeCIDRs: [198.51.100.0/24]\nmasqLinkLocalIPv6: true\n",
		cilium: "169.254.0.0/16 198.51.100.0/24", upstream: "=", strict: "="},
	{name: "JSON", content: `{"nonMasqueradeCIDRs": ["10.0.0.0/8"], "masqLinkLocal": true, "masqLinkLocalIPv6": true}`,
		cilium: "10.0.0.0/8", upstream: "=", strict: "="},
	{name: "resyncInterval", content: "nonMasqueradeCIDRs: [10.0.0.0/9]\nresyncInterval: 60s\n",
		cilium: "10.0.0.0/9 169.254.0.0/16 fe80::/10", upstream: "=", strict: "="},
	{name: "overlapping and repeated", content: "nonMasqueradeCIDRs: [10.1.0.0/16, 10.0.0.0/8, 10.1.0.0/16, 10.1.2.3/32]\n",
		cilium: "10.0.0.0/8 10.1.0.0/16 10.1.2.3/32 169.254.0.0/16 fe80::/10", upstream: "=", strict: "="},
	{name: "zero bytes", content: "", cilium: allDefaults, upstream: rfc1918, strict: "="},
	{name: "the key alone", content: "nonMasqueradeCIDRs:\n", cilium: linkLocals, upstream: "=", strict: "=", warning: "masqueraded"},
	{name: "comments", content: "# nothing\n\n  # here\n", cilium: allDefaults, upstream: rfc1918, strict: "=", warning: "only blanks or comments"},
	{name: "an empty list", content: "nonMasqueradeCIDRs: []\n", cilium: linkLocals, upstream: "=", strict: "=", warning: "masqueraded"},
	{name: "no list", content: "masqLinkLocal: false\n", cilium: linkLocals, upstream: rfc1918, strict: "=", warning: "masqueraded"},
	{name: "host bits", content: "nonMasqueradeCIDRs: [10.0.0.1/8]\n",
		cilium: "10.0.0.0/8 169.254.0.0/16 fe80::/10", upstream: `!"10.0.0.1/8"`, strict: `!"10.0.0.1/8"`, warning: "10.0.0.1/8", key: "nonMasqueradeCIDRs"},
	{name: "an unknown key", content: "nonMasqueradeCIDRs: [192.168.0.0/16]\nmasqLinkLocalIPv4: true\n",
		cilium: "169.254.0.0/16 192.168.0.0/16 fe80::/10", upstream: "=", strict: "!unknown key", warning: "masqLinkLocalIPv4", key: "masqLinkLocalIPv4"},
	{name: "a bad CIDR", content: "nonMasqueradeCIDRs: [10.0.0.0/8, 10.300.0.0/8]\n",
		cilium: `!"10.300.0.0/8"`, upstream: "=", strict: "=", key: "nonMasqueradeCIDRs[1]"},
	{name: "an address", content: "nonMasqueradeCIDRs: [10.1.2.3]\n",
		cilium: `!"10.1.2.3"`, upstream: "=", strict: "=", key: "nonMasqueradeCIDRs[0]"},
	{name: "a null item", content: "nonMasqueradeCIDRs:\n- 10.0.0.0/8\n-\n",
		cilium: "!null", upstream: "=", strict: "=", key: "nonMasqueradeCIDRs[1]"},
	{name: "a string for the list", content: "nonMasqueradeCIDRs: 10.0.0.0/8\n",
		cilium: `!"10.0.0.0/8"`, upstream: "=", strict: "=", key: "nonMasqueradeCIDRs"},
	{name: "a string for a switch", content: "nonMasqueradeCIDRs: [10.0.0.0/8]\nmasqLinkLocal: \"true\"\n",
		cilium: `!"true"`, upstream: "=", strict: "=", key: "masqLinkLocal"},
	{name: "bad YAML", content: "nonMasqueradeCIDRs: [10.0.0.0/8\n", cilium: "!yaml", upstream: "=", strict: "="},
	{name: "no mapping", content: "- 10.0.0.0/8\n", cilium: "!a list", upstream: "=", strict: "="},
}

// probes are destinations in and around the lists above.
var probes = []netip.Addr{
	netip.MustParseAddr("10.9.9.9"), netip.MustParseAddr("10.200.9.9"), netip.MustParseAddr("172.16.9.9"),
	netip.MustParseAddr("100.64.9.9"), netip.MustParseAddr("169.254.9.9"), netip.MustParseAddr("198.51.100.10"),
	netip.MustParseAddr("240.0.0.9"), netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("192.0.2.2"),
	netip.MustParseAddr("2001:db8:99::1"), netip.MustParseAddr("2001:db8:aaaa::1"),
}

// Every row of the table by every profile: what the status says, what is in the
// kernel, and what packets meet.
func TestIPMasqFileRows(t *testing.T) {
	t.Parallel()
	for _, profile := range []string{"cilium", "upstream", "strict"} {
		t.Run(profile, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "ip-masq-agent")
			n := startNode(t, lab.Options{}, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+path, "--ip-masq-agent-profile="+profile)
			w := n.tapWorld()
			inForce := allDefaults
			if profile == "upstream" {
				inForce = rfc1918
			}
			n.awaitKernel(inForce)
			n.wantList(inForce)
			for _, row := range fileRows {
				want := map[string]string{"cilium": row.cilium, "upstream": row.upstream, "strict": row.strict}[profile]
				if want == "=" {
					want = row.cilium
				}
				if err := os.WriteFile(path+".new", []byte(row.content), 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Rename(path+".new", path); err != nil {
					t.Fatal(err)
				}
				cause, rejected := strings.CutPrefix(want, "!")
				if rejected {
					st := n.awaitDegraded(cause)
					wantRejected(t, row.name, st, path, row.key, cause, inForce)
					w.wantByList(inForce, probes[:2])
					continue
				}
				inForce = want
				st, _ := n.awaitList(inForce)
				if row.warning != "" && profile == "cilium" { // the lists before and after may be the same
					st = n.await("a warning with "+row.warning, func(st agent.Status) bool {
						return slices.ContainsFunc(st.Warnings, func(s string) bool { return strings.Contains(s, row.warning) })
					})
				}
				if st.IPMasqAgent.InForce != agent.FromFile || st.IPMasqAgent.LastReload.IsZero() {
					t.Errorf("%s: %+v", row.name, st.IPMasqAgent)
				}
				n.wantList(inForce)
				w.wantByList(inForce, probes)
				if t.Failed() {
					t.Fatalf("at row %q", row.name)
				}
			}
		})
	}
}

func wantRejected(t *testing.T, row string, st agent.Status, path, key, cause, inForce string) {
	t.Helper()
	m := st.IPMasqAgent
	for _, text := range []string{path, key, cause} {
		if !strings.Contains(m.LastError, text) {
			t.Errorf("%s: error %q does not name %q", row, m.LastError, text)
		}
	}
	if m.InForce != agent.FromLastGood || m.Prefixes != len(strings.Fields(inForce)) {
		t.Errorf("%s: in force %q with %d prefixes, want the last good with %d", row, m.InForce, m.Prefixes, len(strings.Fields(inForce)))
	}
}

// wantByList checks that packets are masqueraded but towards the prefixes.
func (w *uplink) wantByList(list string, dsts []netip.Addr) {
	w.n.t.Helper()
	for _, dst := range dsts {
		want := w.n.NodeAddr.Of(dst)
		for _, p := range strings.Fields(list) {
			if netip.MustParsePrefix(p).Contains(dst) {
				want = w.n.PodAddrs[0].Of(dst)
			}
		}
		w.want(dst, want)
	}
}

// A file that can't be read as one keeps the last good list; gone, the defaults
// are back.
func TestIPMasqFileUnreadable(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "ip-masq-agent")
	if err := os.WriteFile(path, []byte("nonMasqueradeCIDRs: [10.0.0.0/8]"), 0o600); err != nil {
		t.Fatal(err)
	}
	n := startNode(t, lab.Options{}, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+path)
	const good = "10.0.0.0/8 169.254.0.0/16 fe80::/10"
	n.awaitKernel(good)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	n.awaitKernel(allDefaults)
	if err := os.WriteFile(path, []byte("nonMasqueradeCIDRs: [10.0.0.0/8]"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.awaitKernel(good)
	if err := os.Symlink(path, path+".loop"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".loop", path); err != nil { // it points to itself
		t.Fatal(err)
	}
	n.awaitDegraded(path)
	n.wantList(good)
	wantBrief(t, n, "config rejected", path)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	n.awaitOK()
	n.awaitKernel(allDefaults)
}

// wantBrief checks a degraded `status --brief`: one line with all texts, exit 3.
func wantBrief(t testing.TB, n *node, texts ...string) {
	t.Helper()
	r := n.try("status", "--brief")
	if r.code != 3 || strings.Count(r.stdout, "\n") != 1 || r.stderr != "" {
		t.Errorf("status --brief: %+v", r)
	}
	for _, text := range texts {
		if !strings.Contains(r.stdout, text) {
			t.Errorf("status --brief: %q does not have %q", r.stdout, text)
		}
	}
}

// A bad file at the first start: what the last run left, else the defaults.
func TestIPMasqFileBadAtStart(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	const good, bad = "nonMasqueradeCIDRs: [198.51.100.0/24]", "nonMasqueradeCIDRs: [nonsense]"
	path := n.write("ip-masq-agent", bad)
	args := []string{podCIDRs, "--enable-ip-masq-agent", "--ip-masq-agent-config-path=" + path}
	w := n.tapWorld()

	n.start(args...)
	n.wantList(allDefaults)
	w.wantByList(allDefaults, probes[:6])
	if st := n.awaitDegraded("nonsense"); st.IPMasqAgent.InForce != agent.FromDefaults {
		t.Errorf("nothing pinned: %+v", st.IPMasqAgent)
	}

	n.write("ip-masq-agent", good)
	const list = "169.254.0.0/16 198.51.100.0/24 fe80::/10"
	n.awaitKernel(list)
	n.awaitOK()
	n.kill()
	n.write("ip-masq-agent", bad)
	n.start(args...)
	n.wantList(list)
	w.wantByList(list, probes[:6])
	st := n.awaitDegraded("nonsense")
	if st.IPMasqAgent.InForce != agent.FromPinned {
		t.Errorf("pinned: %+v", st.IPMasqAgent)
	}
	if i := slices.IndexFunc(st.IPMasqAgent.Rules, func(r policy.Rule) bool { return r.Prefix.String() == "198.51.100.0/24" }); i < 0 || st.IPMasqAgent.Rules[i].Origin != "file "+path {
		t.Errorf("pinned prefixes: %+v, want those of %s", st.IPMasqAgent.Rules, path)
	}
	wantBrief(t, n, "config rejected", path, "nonMasqueradeCIDRs[0]", "nonsense")

	// What an agent without ip-masq-agent left says nothing about the list.
	n.stop()
	n.start(podCIDRs)
	if r := n.try("bpf", "ipmasq", "list"); r.code != 0 || r.stdout != "" || r.stderr != "No entries found.\n" {
		t.Errorf("empty list: %+v", r)
	}
	if out := n.cli("bpf", "ipmasq", "ls", "-o", "json"); out != "[]\n" {
		t.Errorf("empty list: %q", out)
	}
	n.stop()
	n.start(args...)
	n.wantList(allDefaults)
	n.write("ip-masq-agent", good)
	n.awaitKernel(list)
}
