package agent

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/conntrack"
)

func TestSwitchToRules(t *testing.T) {
	for _, tracking := range []bool{false, true} {
		n := onPrograms(t, tracking)
		out, err := n.modeSwitch().toRules(t.Context())
		if err != nil || out != (switched{Moved: switchFlows}) {
			t.Fatalf("%+v, %v", out, err)
		}
		n.isOnRules()
	}
}

func TestSwitchToPrograms(t *testing.T) {
	n := onRules(t)
	s := n.modeSwitch()
	out, err := s.toPrograms(t.Context())
	if err != nil || out != (switched{Moved: switchFlows}) || s.finish() != nil {
		t.Fatalf("%+v, %v", out, err)
	}
	n.isOnPrograms()
}

// A crash before any step, and a start in the same mode or in the other one.
func TestSwitchCutOff(t *testing.T) {
	ctx := t.Context()
	toRules := func(n *fakeNode) error { _, err := n.modeSwitch().toRules(ctx); return err }
	toPrograms := func(n *fakeNode) error {
		s := n.modeSwitch()
		_, err := s.toPrograms(ctx)
		return errors.Join(err, s.finish())
	}
	for name, c := range map[string]struct {
		node  func() *fakeNode
		first func(*fakeNode) error
	}{
		"to rules":           {func() *fakeNode { return onPrograms(t, false) }, toRules},
		"to rules, tracking": {func() *fakeNode { return onPrograms(t, true) }, toRules},
		"to programs":        {func() *fakeNode { return onRules(t) }, func(n *fakeNode) error { _, err := n.modeSwitch().toPrograms(ctx); return err }},
	} {
		whole := c.node()
		if err := c.first(whole); err != nil {
			t.Fatal(err)
		}
		for crash := 1; crash <= whole.steps; crash++ {
			for _, again := range []string{"rules", "programs"} {
				n := c.node()
				n.crash = crash
				if err := c.first(n); !errors.Is(err, errCrash) {
					t.Fatalf("%s: crash at %d: %v", name, crash, err)
				}
				then, is := toRules, n.isOnRules
				if again == "programs" {
					then, is = toPrograms, n.isOnPrograms
				}
				n.packet = func(step int) {
					if step%5 == 0 {
						n.opens(step)
					}
				}
				if err := then(n); err != nil {
					t.Fatalf("%s: crash at %d, then to %s: %v", name, crash, again, err)
				}
				is()
				if t.Failed() {
					t.Fatalf("%s: crash at %d, then to %s", name, crash, again)
				}
			}
		}
	}
}

// What netfilter does not take, or must not lose, stays with the old side, and goes on.
func TestSwitchLeaves(t *testing.T) {
	n := onPrograms(t, false)
	n.refuse = map[flowKey]bool{keyOf(talking(3)): true, keyOf(talking(8)): true}
	out, err := n.modeSwitch().toRules(t.Context())
	if err != nil || out != (switched{Moved: switchFlows - 2, Left: 2}) {
		t.Fatalf("%+v, %v", out, err)
	}
	n.settled()
	n.check()

	n = onRules(t)
	ftp := n.entries[keyOf(talking(5))]
	ftp.Helper, ftp.SNAT = "ftp", true
	n.entries[keyOf(talking(5))] = ftp
	s := n.modeSwitch()
	s.wanted = func(c conntrack.Flow) bool { return c.Src != talking(6).Src }
	out, err = s.toPrograms(t.Context())
	if err != nil || out != (switched{Moved: switchFlows - 2, Left: 1}) {
		t.Fatalf("%+v, %v", out, err)
	}
	n.settled()
	n.check()

	// Another address of a rule that was taken over.
	n = onRules(t)
	other := n.entries[keyOf(talking(6))]
	other.SNAT = true
	n.entries[keyOf(talking(6))] = other
	s = n.modeSwitch()
	s.wanted = func(c conntrack.Flow) bool { return c.Src != talking(6).Src }
	s.stays = func(conntrack.Flow) bool { return true }
	out, err = s.toPrograms(t.Context())
	if err != nil || out != (switched{Moved: switchFlows - 1, Left: 1}) || !slices.Equal(s.kept, []netip.Addr{other.Xlate.Addr()}) {
		t.Fatalf("%+v, %v, %v", out, s.kept, err)
	}
	n.settled()
	n.check()
}

// Connections that come meanwhile are with one side or the other.
func TestSwitchNewConnections(t *testing.T) {
	for name, c := range map[string]struct {
		node func(*testing.T) *fakeNode
		do   func(*modeSwitch) (switched, error)
	}{
		"to rules":    {func(t *testing.T) *fakeNode { return onPrograms(t, false) }, func(s *modeSwitch) (switched, error) { return s.toRules(t.Context()) }},
		"to programs": {onRules, func(s *modeSwitch) (switched, error) { return s.toPrograms(t.Context()) }},
	} {
		t.Run(name, func(t *testing.T) {
			n := c.node(t)
			n.packet = n.opens
			out, err := c.do(n.modeSwitch())
			if err != nil || out.Left != 0 || out.Moved < switchFlows {
				t.Errorf("%+v, %v", out, err)
			}
			n.settled()
		})
	}
}

// A connection to a service keeps its endpoint.
func TestSwitchKeepsService(t *testing.T) {
	f := talking(1)
	service := netip.MustParseAddrPort("10.96.0.1:443")
	old := plain(described(f, conntrack.Flow{}))
	old.Dst, old.DNAT, old.Mark = service, true, 7
	n := onPrograms(t, true)
	n.entries[keyOf(f)] = old
	if _, err := n.modeSwitch().toRules(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c := n.entries[keyOf(f)]; c.Dst != service || c.Remote != f.Dst || c.Xlate != f.Xlate || c.Mark != 7 {
		t.Errorf("%+v", c)
	}
	if _, err := n.modeSwitch().toPrograms(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c := n.entries[keyOf(f)]; c.Dst != service || c.Remote != f.Dst || c.Xlate != f.Src || c.Mark != 7 {
		t.Errorf("%+v", c)
	}
}

// A connection of another zone between the same two does not hide that of zone 0.
func TestSwitchWithZones(t *testing.T) {
	n := onPrograms(t, true)
	for i := range switchFlows {
		c := plain(described(talking(i), conntrack.Flow{}))
		c.Zone = 7
		n.other = append(n.other, c)
	}
	out, err := n.modeSwitch().toRules(t.Context())
	if err != nil || out != (switched{Moved: switchFlows}) {
		t.Fatalf("%+v, %v", out, err)
	}
	n.isOnRules()
}

// Associations that netfilter knows nothing of are told; those that it follows are not.
func TestSwitchTellsOfSCTP(t *testing.T) {
	n := onPrograms(t, false)
	for i, proto := range []uint8{unix.IPPROTO_SCTP, unix.IPPROTO_SCTP, unix.IPPROTO_TCP} {
		f := talking(900 + i)
		f.Proto = proto
		n.mappings[keyOf(f)] = f
		if i == 0 {
			n.entries[keyOf(f)] = plain(described(f, conntrack.Flow{}))
		}
	}
	if stuck, err := n.modeSwitch().stuckSCTP(t.Context()); err != nil || stuck != 1 {
		t.Errorf("%d stuck, want 1; %v", stuck, err)
	}
}

// Rules of iptables mode that can't be seen are not there only where that mode never was.
func TestSwitchFromRulesOutOfSight(t *testing.T) {
	for _, c := range []struct {
		mode   string
		hidden []string
		want   bool
	}{
		{ModeIPTables, []string{"iptables is not installed: rules of iptables mode were not looked for"}, true},
		{ModeIPTables, nil, false}, // gone, by reboot or cleanup
		{ModeBPF, []string{"iptables is not installed"}, false},
		{"", []string{"iptables is not installed"}, false},
	} {
		l := &loop{runDir: t.TempDir()}
		if c.mode != "" {
			if err := (PolicyFile{Format: policyFormat, Mode: c.mode}).write(l.runDir); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.outOfSight(c.hidden); (err != nil) != c.want {
			t.Errorf("%q, %q: %v", c.mode, c.hidden, err)
		}
	}
}
