package datapath

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// netfilterRules masquerade the second pod's packets on eth0, as kube-proxy or
// another masquerade does, and forward a port of the node to it, as the portmap
// plug-in does for a hostPort.
const netfilterRules = `
table inet other {
	chain postrouting {
		type nat hook postrouting priority srcnat
		oifname "eth0" ip saddr %[1]s masquerade
		oifname "eth0" ip6 saddr %[2]s masquerade
	}
	chain prerouting {
		type nat hook prerouting priority dstnat
		iifname "eth0" meta nfproto ipv4 udp dport 40000 dnat ip to %[1]s:9000
		iifname "eth0" meta nfproto ipv6 udp dport 40000 dnat ip6 to [%[2]s]:9000
	}
}`

// netfilterNode is a node with two ports for mappings and netfilter's rules.
func netfilterNode(t *testing.T, without []Feature) (*lab.Topology, *bench) {
	labtest.Tool(t, "nft")
	topo := labtest.NewNode(t, lab.Options{Pods: 2})
	rules := filepath.Join(t.TempDir(), "rules")
	text := fmt.Sprintf(netfilterRules, topo.PodAddrs[1].V4, topo.PodAddrs[1].V6)
	if err := os.WriteFile(rules, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := topo.Node.Run(within(t, 10*time.Second), "nft", "-f", rules); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	b := newBench(t, topo.Node, Options{Without: without})
	in := nodePolicy(t, topo)
	in.Ports = []uint16{40000, 40001}
	b.apply(in)
	return topo, b
}

// talk is a conversation of a pod with an echo server.
type talk struct {
	seen netip.AddrPort
	say  func() error
}

// tcpTalk connects from port 40000 of a pod.
func tcpTalk(t *testing.T, pod *lab.NS, addr netip.Addr, server netip.AddrPort) talk {
	t.Helper()
	seen, c, err := lab.AskTCP(within(t, 10*time.Second), pod, netip.AddrPortFrom(addr, 40000), server)
	if err != nil {
		t.Fatal(err)
	}
	c.SetLinger(0) // the next one has the same port
	labtest.Close(t, c.Close)
	return talk{seen, func() error {
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := fmt.Fprintf(c, "%s\n", addr); err != nil {
			return err
		}
		line, err := bufio.NewReader(c).ReadString('\n')
		if err == nil && line != addr.String()+"\n" {
			err = fmt.Errorf("%q came back", line)
		}
		return err
	}}
}

func udpTalk(t *testing.T, pod *lab.NS, addr netip.Addr, server netip.AddrPort) talk {
	t.Helper()
	c, err := lab.DialUDP(t.Context(), pod, netip.AddrPortFrom(addr, 40000), server)
	if err != nil {
		t.Fatal(err)
	}
	labtest.Close(t, c.Close)
	var u talk
	u.say = func() error {
		seen, err := lab.AskUDPOn(within(t, 5*time.Second), c, []byte(addr.String()))
		if err == nil && u.seen.IsValid() && seen != u.seen {
			err = fmt.Errorf("seen as %s, before as %s", seen, u.seen)
		}
		u.seen = seen
		return err
	}
	if err := u.say(); err != nil {
		t.Fatal(err)
	}
	return u
}

// Another masquerade beside ours has the same address and the same port towards
// the same server: whoever comes first keeps it, both get their answers.
func TestNetfilterBeside(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, _ Hook) {
		topo, b := netfilterNode(t, without)
		for _, world := range topo.WorldAddr.All() {
			for name, c := range map[string]struct {
				server func(*lab.NS, netip.AddrPort) (*lab.Server, error)
				talk   func(*testing.T, *lab.NS, netip.Addr, netip.AddrPort) talk
			}{"TCP": {lab.EchoTCP, tcpTalk}, "UDP": {lab.EchoUDP, udpTalk}} {
				for _, first := range []int{0, 1} {
					t.Run(fmt.Sprintf("%s %s pod%d first", name, world, first), func(t *testing.T) {
						b.forgetFlows()
						server, err := c.server(topo.World, netip.AddrPortFrom(world, 0))
						if err != nil {
							t.Fatal(err)
						}
						labtest.Close(t, server.Close)
						var talks []talk
						for _, i := range []int{first, 1 - first} {
							talks = append(talks, c.talk(t, topo.Pods[i], topo.PodAddrs[i].Of(world), server.Addr))
						}
						node := topo.NodeAddr.Of(world)
						if a, b := talks[0].seen, talks[1].seen; a != netip.AddrPortFrom(node, 40000) || b != netip.AddrPortFrom(node, 40001) {
							t.Errorf("the world saw %s, then %s", a, b)
						}
						for range 2 {
							if err := errors.Join(talks[0].say(), talks[1].say()); err != nil {
								t.Error(err)
							}
						}
						b.inspect(func(in *Inspector) error {
							usage, err := in.Usage()
							if n := usage[0].Foreign + usage[1].Foreign; n != first {
								t.Errorf("%d flows counted as translated by others, want %d", n, first)
							}
							return err
						})
					})
				}
			}
		}
	})
}

// A connection to a hostPort has no socket on the node. Its tuple is no pod's while
// it is in use.
func TestNetfilterHostPort(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, _ Hook) {
		topo, _ := netfilterNode(t, without)
		for _, world := range topo.WorldAddr.All() {
			inside, err := lab.EchoUDP(topo.Pods[1], netip.AddrPortFrom(topo.PodAddrs[1].Of(world), 9000))
			if err != nil {
				t.Fatal(err)
			}
			labtest.Close(t, inside.Close)
			c, err := lab.ListenUDP(topo.World, netip.AddrPortFrom(world, 7000))
			if err != nil {
				t.Fatal(err)
			}
			labtest.Close(t, c.Close)
			hostPort := netip.AddrPortFrom(topo.NodeAddr.Of(world), 40000)
			outside := ear{c}
			if answer, err := outside.ask(hostPort, "one"); err != nil || !strings.HasSuffix(answer, "one") {
				t.Fatalf("hostPort: %q, %v", answer, err)
			}
			pod, err := lab.DialUDP(t.Context(), topo.Pods[0], netip.AddrPortFrom(topo.PodAddrs[0].Of(world), 40000), netip.AddrPortFrom(world, 7000))
			if err != nil {
				t.Fatal(err)
			}
			labtest.Close(t, pod.Close)
			if _, err := pod.Write([]byte("from the pod")); err != nil {
				t.Fatal(err)
			}
			text, from, err := outside.next(within(t, 5*time.Second))
			if err != nil || text != "from the pod" || from != netip.AddrPortFrom(hostPort.Addr(), 40001) {
				t.Fatalf("%q from %s, %v", text, from, err)
			}
			if answer, err := outside.ask(hostPort, "two"); err != nil || !strings.HasSuffix(answer, "two") {
				t.Errorf("hostPort: %q, %v", answer, err)
			}
			if _, err := c.WriteToUDPAddrPort([]byte("to the pod"), from); err != nil {
				t.Fatal(err)
			}
			pod.SetDeadline(time.Now().Add(5 * time.Second))
			buf := make([]byte, 100)
			if n, err := pod.Read(buf); err != nil || string(buf[:n]) != "to the pod" {
				t.Errorf("the pod got %q, %v", buf[:n], err)
			}
		}
	})
}

// ear is a socket that anybody may send to.
type ear struct{ *net.UDPConn }

func (e ear) next(ctx context.Context) (text string, from netip.AddrPort, err error) {
	deadline, _ := ctx.Deadline()
	e.SetReadDeadline(deadline)
	buf := make([]byte, 1000)
	n, from, err := e.ReadFromUDPAddrPort(buf)
	return string(buf[:n]), netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), err
}

// ask sends a datagram and returns the next one, which must come from there.
func (e ear) ask(to netip.AddrPort, text string) (string, error) {
	if _, err := e.WriteToUDPAddrPort([]byte(text), to); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	answer, from, err := e.next(ctx)
	if err == nil && from != to {
		err = fmt.Errorf("from %s, asked %s", from, to)
	}
	return answer, err
}
