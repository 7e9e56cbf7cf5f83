package e2e_test

import (
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/lab"
)

// detach takes a program off eth0 as somebody else would: by its link, or with the
// qdisc.
func (n *node) detach(hook datapath.Hook, direction string) {
	n.t.Helper()
	if hook == datapath.HookTC {
		if out, err := n.Node.Run(n.t.Context(), "tc", "qdisc", "del", "dev", "eth0", "clsact"); err != nil {
			n.t.Fatal(err, out)
		}
		return
	}
	pins, err := filepath.Glob(filepath.Join(n.bpfRoot, direction+"_*"))
	if err != nil || len(pins) != 1 {
		n.t.Fatalf("pins of links: %v %v", pins, err)
	}
	l, err := link.LoadPinnedLink(pins[0], nil)
	must(n.t, err)
	defer l.Close()
	must(n.t, l.Detach())
}

// What somebody else takes off a device is back within a second; until then the
// status says so.
func TestDetachedByOthers(t *testing.T) {
	eachHook(t, lab.Options{}, func(t *testing.T, n *node) {
		up := n.tapWorld()
		up.want(n.WorldAddr.V4, n.NodeAddr.V4)
		hook := n.status().Devices[0].Hook
		var took []time.Duration
		for i := range 6 {
			direction := []string{"egress", "ingress"}[i%2]
			n.detach(hook, direction)
			start := time.Now()
			st, err := n.readStatus()
			must(t, err)
			if len(attached(st)) == 0 && !slices.Contains(st.Degraded(), "device eth0 is not attached") {
				t.Errorf("%s: degraded: %q", direction, st.Degraded())
			}
			n.awaitAttached("eth0")
			took = append(took, time.Since(start))
		}
		within1s(t, "attached again", took...)
		n.awaitOK()
		up.want(n.WorldAddr.V4, n.NodeAddr.V4)
		up.want(n.WorldAddr.V6, n.NodeAddr.V6)
	})
}

// The ports on which tunnels receive are not external ports.
func TestTunnelPortsAreNotUsed(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{}, "--snat-port-range=4780-4799,8470-8479")
	if st := n.status(); st.Ports.Ranges != "4780-4799,8470-8479" {
		t.Errorf("ports: %s", st.Ports.Ranges)
	}
	must(t, n.Node.AddVXLAN("vx0", 7, n.NodeAddr.V4, n.WorldAddr.V4))
	n.awaitPorts("4780-4799,8470-8471,8473-8479")
	must(t, n.Node.DeleteLink("vx0"))
	n.awaitPorts("4780-4799,8470-8479")
}

func (n *node) awaitPorts(want string) {
	n.t.Helper()
	n.await("ports "+want, func(st agent.Status) bool { return st.Ports.Ranges == want })
}
