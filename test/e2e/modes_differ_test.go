package e2e_test

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/agent"
)

// Why a test has no place in iptables mode, as docs/modes.md tells users.
const (
	noPrograms  = "rules are no programs, and nothing is pinned"
	firstPacket = "netfilter asks its rules for the first packet of a connection, and keeps to what they said"
	itsFlows    = "netfilter keeps the connections, and ends them, as its sysctls say"
	noBounds    = "netfilter bounds the connections of all together, not those of a source, and drops in silence"
	itsSearch   = "the kernel searches for a port, in one run of the pool, some 250 times"
	strangers   = "what comes for a connection that netfilter does not know is the node's own"
)

// notInIPTables are the tests that have no place in the runs in iptables mode.
var notInIPTables = map[string]string{
	"TestBPFFS":               noPrograms,
	"TestDetachedByOthers":    noPrograms, // of rules: TestIPTablesModeHeals
	"TestLeakSentinel":        noPrograms,
	"TestMetrics":             noPrograms, // of rules: TestIPTablesModeMetrics
	"TestExclusionRemoved":    firstPacket,
	"TestReclaimWithoutAgent": itsFlows,
	"TestFloodedNeighbor":     noBounds,
	"TestRefusedAtOnce":       noBounds,
	"TestPortRangesFull":      itsSearch, // of the ranges: TestPortsOnTheWire in internal/iptables
	"TestLostState":           strangers,
	"BenchmarkScale":          noPrograms, // packets are shown to programs
	"BenchmarkScaleList":      noPrograms,
	"BenchmarkScaleScrape":    noPrograms,
}

// Each test of the table exists, and the page for users has its reason, and those of the
// table of cases that both modes share.
func TestModesPage(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/modes.md")
	must(t, err)
	reasons := make(map[string]bool)
	for line := range strings.Lines(string(page)) {
		if cells := strings.Split(line, " | "); len(cells) == 3 && strings.HasPrefix(line, "| ") {
			reasons[strings.TrimSpace(cells[1])] = true
		}
	}
	files, err := filepath.Glob("*_test.go")
	must(t, err)
	var source strings.Builder
	for _, file := range files {
		text, err := os.ReadFile(file)
		must(t, err)
		source.Write(text)
	}
	for name, why := range notInIPTables {
		if !strings.Contains(source.String(), "\nfunc "+name+"(") {
			t.Errorf("there is no test %s", name)
		}
		if !reasons[why] {
			t.Errorf("docs/modes.md does not give the reason of %s: %s", name, why)
		}
	}
}

// What differs for the tests that run in both modes.

var lineOfBPF = regexp.MustCompile(`BPF( \(ip-masq-agent\))?   \[.*\]   \S.* (\[IPv4)`)

// line says how a status line of eBPF mode reads in the mode of the run.
func (n *node) line(bpf string) string {
	if n.backend == "" {
		return bpf
	}
	return lineOfBPF.ReplaceAllString(bpf, "IPTables$1 $2")
}

// mode is what the status calls the mode of the run.
func (n *node) mode() string {
	if n.backend == "" {
		return agent.ModeBPF
	}
	return agent.ModeIPTables
}

// wantCounts checks the packets by outcome, which eBPF mode alone counts.
func (n *node) wantCounts(ok func(c map[string]uint64) bool) {
	n.t.Helper()
	if n.backend != "" {
		return
	}
	if c := n.counts(); !ok(c) {
		n.t.Errorf("counts: %v", c)
	}
}

// inBPF does what eBPF mode alone has something for.
func (n *node) inBPF(f func()) {
	n.t.Helper()
	if n.backend == "" {
		f()
	}
}

// lineNames tells whether a status line names the devices, in brackets. That of iptables
// mode names none.
func (n *node) lineNames(line, devices string) bool {
	return strings.Contains(line, devices) == (n.backend == "")
}

// place is what an agent's data plane is in, as messages name it.
func (n *node) place() string {
	if n.backend == "" {
		return n.bpfRoot
	}
	return "rule"
}

// isTaken are the texts with which a second agent refuses: those for a directory, or those
// for rules, of which each network namespace has one set.
func (n *node) isTaken(directory ...string) []string {
	if n.backend == "" {
		return directory
	}
	return []string{"another agent in iptables mode", "hint: stop"}
}

// flows are the connections in the status.
func (n *node) flows() int {
	n.t.Helper()
	f := n.status().Flows
	if n.backend == "" {
		return f.IPv4.Flows + f.IPv6.Flows
	}
	return f.Conntrack.Entries
}

// parts are what the data plane is made of: pins, or chains.
func (n *node) parts() (names []string) {
	n.t.Helper()
	if n.backend != "" {
		for _, table := range []string{"nat", "mangle"} {
			for line := range strings.Lines(n.tables("iptables-"+n.backend, "-t", table, "-S")) {
				if chain, ok := strings.CutPrefix(strings.TrimSpace(line), "-N BAUTA-"); ok {
					names = append(names, table+" BAUTA-"+chain)
				}
			}
		}
		return names
	}
	pins, err := os.ReadDir(n.bpfRoot)
	must(n.t, err)
	for _, pin := range pins {
		names = append(names, pin.Name())
	}
	return names
}

// breakPart removes a pin, or all rules of a chain.
func (n *node) breakPart(name string) {
	n.t.Helper()
	if table, chain, ok := strings.Cut(name, " "); ok {
		n.tables("iptables-"+n.backend, "-t", table, "-F", chain)
		return
	}
	if err := os.Remove(filepath.Join(n.bpfRoot, name)); !errors.Is(err, os.ErrNotExist) {
		must(n.t, err)
	}
}

// What netfilter does only by a sysctl, and eBPF mode always.

// accounts makes connections have an age, packets and bytes.
func (n *node) accounts() {
	n.netfilter("net.netfilter.nf_conntrack_acct", "net.netfilter.nf_conntrack_timestamp")
}

// forgetsResets makes a connection that was reset be gone a second later, so that the ports
// are free for one in the other direction.
func (n *node) forgetsResets() { n.netfilter("net.netfilter.nf_conntrack_tcp_timeout_close") }

// reassembles makes the node wait for a datagram however many fragments of others come in
// between: netfilter sees whole ones only.
func (n *node) reassembles() {
	n.t.Helper()
	if n.backend != "" {
		must(n.t, n.Node.Sysctl("net.ipv4.ipfrag_max_dist", "0"))
	}
}

// netfilter sets sysctls to 1.
func (n *node) netfilter(keys ...string) {
	n.t.Helper()
	if n.backend == "" {
		return
	}
	for _, key := range keys {
		must(n.t, n.Node.Sysctl(key, "1"))
	}
}

// translated are the packets of pods that eBPF mode counted.
func (n *node) translated() uint64 {
	n.t.Helper()
	if n.backend != "" {
		return 0
	}
	c := n.counts()
	return c["masq-new"] + c["masq-known"]
}
