package e2e_test

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// Large datagrams go on as they are while the policy changes, also when it excludes
// the server that a flow is masqueraded to: no fragment gets another verdict than
// its first.
func TestFragmentsWhilePolicyChanges(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	path := n.writeList("198.51.100.0/24")
	n.start(podCIDRs, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+path)
	wire := n.watchWire()
	var flows []*echoFlow
	for _, dst := range n.WorldAddr.All() {
		flows = append(flows, n.echoFlow(t, dst))
	}
	for i := range 20 {
		list := []string{fmt.Sprintf("198.51.100.%d/32", i)}
		if i%2 == 0 {
			for _, dst := range n.WorldAddr.All() {
				list = append(list, netip.PrefixFrom(dst, dst.BitLen()).String())
			}
		}
		n.writeList(list...)
		for deadline := time.Now().Add(300 * time.Millisecond); time.Now().Before(deadline); {
			for _, f := range flows {
				f.ask(t, bytes.Repeat([]byte{byte(i)}, 60000))
			}
		}
	}
	wire.check(t)
	if st := n.status(); st.IPMasqAgent.LastError != "" {
		t.Errorf("the file was refused: %s", st.IPMasqAgent.LastError)
	}
}

// echoFlow is a UDP socket of a pod that talks to an echo server.
type echoFlow struct {
	*net.UDPConn
	seen string // the greeting: who the server thinks it talks to
}

func (n *node) echoFlow(t *testing.T, dst netip.Addr) *echoFlow {
	t.Helper()
	c, err := lab.DialUDP(t.Context(), n.Pods[0], netip.AddrPort{}, server(t, lab.EchoUDP, n.World, anyPort(dst)))
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return &echoFlow{UDPConn: c}
}

// ask sends a datagram, once, and expects it back from a server that sees the same
// source as ever.
func (f *echoFlow) ask(t *testing.T, payload []byte) {
	t.Helper()
	_, err := f.Write(payload)
	must(t, err)
	buf := make([]byte, 1<<16)
	f.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, err := f.Read(buf)
	if err != nil {
		t.Fatalf("%d bytes to %s: %v", len(payload), f.RemoteAddr(), err)
	}
	seen, rest, _ := strings.Cut(string(buf[:n]), "\n")
	if f.seen == "" {
		f.seen = seen
	}
	if rest != string(payload) || seen != f.seen {
		t.Fatalf("%d of %d bytes came back; %s, at first %s", len(rest), len(payload), seen, f.seen)
	}
}

// Large pings in both directions: out of the pod, and from outside to the pod and to
// the node.
func TestLargePings(t *testing.T) {
	t.Parallel()
	tool := labtest.Tool(t, "ping")
	eachHook(t, lab.Options{WorldKnowsPods: true}, func(t *testing.T, n *node) {
		for _, dst := range n.WorldAddr.All() {
			for _, c := range []struct {
				from *lab.NS
				src  netip.Addr
				dst  netip.Addr
			}{
				{n.Pods[0], n.PodAddrs[0].Of(dst), dst},
				{n.World, n.Excluded.Of(dst), n.PodAddrs[0].Of(dst)},
				{n.World, dst, n.NodeAddr.Of(dst)},
				{n.Node, n.NodeAddr.Of(dst), dst},
			} {
				for _, size := range []string{"1472", "3000", "30000"} {
					if err := pings(t, c.from, tool, "-I", c.src.String(), "-s", size, c.dst.String()); err != nil {
						t.Error(err)
					}
				}
			}
		}
		n.wantCounts(func(c map[string]uint64) bool {
			return c["drop-fragment"]+c["hold-fragment"]+c["pass-fragment"] == 0
		})
	})
}

// A socket that leaves it to the kernel to cut its datagrams (UDP_SEGMENT) makes one
// packet of many: each segment is translated and counted, in both directions.
func TestUDPSegments(t *testing.T) {
	t.Parallel()
	const segment, segments = 1400, 40
	eachHook(t, lab.Options{}, func(t *testing.T, n *node) {
		capture := labtest.Capture(t, n.Node, "eth0", lab.CaptureOptions{MaxPackets: 1})
		super := func(out bool) *lab.Counter {
			return capture.Count(func(p lab.Packet) bool { return p.Outgoing == out && len(p.Data) > segment*segments })
		}
		left, arrived := super(true), super(false)
		for i, dst := range n.WorldAddr.All() {
			srv, err := lab.ListenUDP(n.World, anyPort(dst))
			must(t, err)
			defer srv.Close()
			c, err := lab.DialUDP(t.Context(), n.Pods[0], netip.AddrPort{}, srv.LocalAddr().(*net.UDPAddr).AddrPort())
			must(t, err)
			defer c.Close()
			before := n.translated()
			payload := make([]byte, segment*segments)
			for i := range payload {
				payload[i] = byte(i / segment)
			}
			setOption(t, c, unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment)
			_, err = c.Write(payload)
			must(t, err)
			from := readSegments(t, srv, payload, segment)
			if from.Addr() != n.NodeAddr.Of(dst) {
				t.Errorf("seen as %s", from)
			}
			setOption(t, srv, unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment)
			_, err = srv.WriteToUDPAddrPort(payload, from)
			must(t, err)
			readSegments(t, c, payload, segment)
			n.wantCounts(func(c map[string]uint64) bool { return c["masq-new"]+c["masq-known"]-before == 2*segments })
			if left.N() != i+1 || arrived.N() != i+1 {
				t.Errorf("%s: %d super-packets left and %d arrived, want %d each", family(dst), left.N(), arrived.N(), i+1)
			}
		}
	})
}

// readSegments reads datagrams that were sent as one payload; it returns who sent them.
func readSegments(t *testing.T, c *net.UDPConn, payload []byte, segment int) (from netip.AddrPort) {
	t.Helper()
	buf := make([]byte, 1<<16)
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	for at := 0; at < len(payload); at += segment {
		n, src, err := c.ReadFromUDPAddrPort(buf)
		if err != nil || !bytes.Equal(buf[:n], payload[at:at+segment]) {
			t.Fatalf("segment %d: %d bytes from %s, %v", at/segment, n, src, err)
		}
		from = netip.AddrPortFrom(src.Addr().Unmap(), src.Port())
	}
	return from
}
