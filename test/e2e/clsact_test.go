package e2e_test

import (
	"log/slog"
	"testing"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/policy"
)

// clsact makes every agent of the node use clsact filters on eth0, also on a
// kernel with tcx: it attaches as an older kernel would, and agents keep the hook
// that they find.
func (n *node) clsact() {
	n.t.Helper()
	index, err := n.Node.Index("eth0")
	if err != nil {
		n.t.Fatal(err)
	}
	in := policy.Input{
		IPv4: true, IPv6: true,
		Sources:   []policy.Rule{{Prefix: lab.PodRange4}, {Prefix: lab.PodRange6}},
		HostAddrs: append(n.NodeAddr.All(), n.PodGateway.All()...),
		Devices:   []policy.Device{{Name: "eth0", Index: index, Ethernet: true, IPv4: n.NodeAddr.V4, IPv6: n.NodeAddr.V6}},
	}
	for p := uint16(32768); p != 0; p++ {
		in.Ports = append(in.Ports, p)
	}
	p, err := policy.Build(in)
	if err != nil {
		n.t.Fatal(err)
	}
	err = n.Node.Do(func() error {
		d, err := datapath.Open(datapath.Options{
			Root: n.bpfRoot, DefaultFlows: 1 << 16, NoTCX: true, AllowPrivateBPFFS: true, Log: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			return err
		}
		defer d.Close()
		return d.Apply(n.t.Context(), p)
	})
	if err != nil {
		n.t.Fatal(err)
	}
}

// eachHook runs a test with a node of its own on each kind of attachment.
func eachHook(t *testing.T, opts lab.Options, test func(*testing.T, *node), args ...string) {
	t.Helper()
	for _, hook := range []datapath.Hook{datapath.HookTCX, datapath.HookTC} {
		t.Run(string(hook), func(t *testing.T) {
			t.Parallel()
			n := newNode(t, opts)
			if hook == datapath.HookTC {
				n.clsact()
			}
			n.start(append([]string{podCIDRs}, args...)...)
			if st := n.status(); len(st.Devices) != 1 || st.Devices[0].Hook != hook {
				t.Fatalf("devices: %+v, want one on %s", st.Devices, hook)
			}
			test(t, n)
		})
	}
}
