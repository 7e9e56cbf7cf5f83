package e2e_test

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// table opens a pinned table of flows.
func (n *node) table(name string) *ebpf.Map {
	n.t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(n.bpfRoot, name), nil)
	must(n.t, err)
	labtest.Close(n.t, m.Close)
	return m
}

// wipe deletes all entries behind the data plane's back, and says how many.
func wipe(m *ebpf.Map) (deleted int, err error) {
	var keys [][]byte
	key, err := m.NextKeyBytes(nil)
	for ; err == nil && key != nil; key, err = m.NextKeyBytes(key) {
		keys = append(keys, key)
	}
	for _, key := range keys {
		if m.Delete(key) == nil {
			deleted++
		}
	}
	return deleted, err
}

// A running transfer survives the loss of its mapping, of either half or of both,
// with the port it had (Cilium issue 37747); what the world sends meanwhile is not
// answered by the node's own stack.
func TestLostState(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{})
	wire := n.watchWire()
	for _, dst := range n.WorldAddr.All() {
		echo := server(t, lab.EchoTCP, n.World, anyPort(dst))
		v := family(dst)[1:]
		forward, reverse := n.table("forward"+v), n.table("reverse"+v)
		for name, lost := range map[string][]*ebpf.Map{"forward": {forward}, "reverse": {reverse}, "both": {reverse, forward}} {
			t.Run(name+" "+family(dst), func(t *testing.T) { testLostState(t, n, echo, lost) })
		}
	}
	wire.check(t)
	if c := n.counts(); c["drop-stray"] > 0 {
		t.Logf("%d resets of the node were kept", c["drop-stray"])
	}
}

func testLostState(t *testing.T, n *node, echo netip.AddrPort, lost []*ebpf.Map) {
	const size = 128 << 20
	done := make(chan error, 1)
	go func() {
		_, err := transfer(within(t, time.Minute), n.Pods[0], echo, size)
		done <- err
	}()
	running := func(e entry) bool { return e.Dir == "OUT" && e.Bytes > 1<<20 && e.State == "established" }
	var before entry
	labtest.Eventually(t, 30*time.Second, func() error {
		list := n.natList("--remote", echo.String())
		if i := slices.IndexFunc(list, running); i >= 0 {
			before = list[i]
			return nil
		}
		return fmt.Errorf("no transfer: %+v", list)
	})
	for _, m := range lost {
		if deleted, err := wipe(m); err != nil || deleted == 0 {
			t.Fatalf("%d entries deleted: %v", deleted, err)
		}
	}
	select {
	case err := <-done:
		t.Fatalf("the transfer had ended before: %v", err)
	default:
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	var after []uint16
	for _, e := range n.natList("--remote", echo.String()) {
		if e.Dir == "OUT" && e.SrcPort == before.SrcPort {
			after = append(after, e.XlatePort)
		}
	}
	if len(after) != 1 || after[0] != before.XlatePort {
		t.Errorf("external port %d, afterwards %v", before.XlatePort, after)
	}
}
