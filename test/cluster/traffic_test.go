package cluster_test

import (
	"net/netip"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/test/cluster"
	"bauta.dev/bauta/test/cluster/talk"
)

// ask asks once and fails the test without an answer.
func ask(t *testing.T, p *cluster.Pod, proto string, to netip.AddrPort) talk.Answer {
	t.Helper()
	a, err := p.Ask(t.Context(), proto, to)
	if err != nil {
		t.Fatalf("%s asks %s over %s: %v", p.Name, to, proto, err)
	}
	return a
}

// echo is the port of the outside's server for a protocol.
func echo(a netip.Addr, proto string) netip.AddrPort {
	if proto == "http" {
		return netip.AddrPortFrom(a, cluster.EchoPort+1)
	}
	return netip.AddrPortFrom(a, cluster.EchoPort)
}

// The main job: the outside sees the node, whatever the pod speaks.
func TestWorldSeesTheNode(t *testing.T) {
	noLeak(t)
	for i, pod := range podOn {
		both(t, func(t *testing.T, of func(lab.Pair) netip.Addr) {
			want := of(node(i).Addr)
			for _, proto := range []string{"tcp", "udp", "http"} {
				if a := ask(t, pod, proto, echo(of(cluster.World), proto)); a.Source.Addr() != want {
					t.Errorf("%s from %s: the outside saw %s, want %s", proto, pod.Name, a.Source, want)
				}
			}
			seen := shared.Fabric.Wire.Count(func(p lab.Packet) bool {
				f, ok := lab.ParseFrame(p.Data)
				kind, _, _, icmp := f.ICMP()
				return ok && icmp && (kind == 8 || kind == 128) && f.Src == want && f.Dst == of(cluster.World)
			})
			before := seen.N()
			if err := pod.Ping(t.Context(), of(cluster.World)); err != nil {
				t.Error(err)
			}
			if seen.N() != before+1 {
				t.Errorf("echo requests that came from %s: %d, want 1", want, seen.N()-before)
			}
		})
	}
}

// Traffic inside the cluster keeps its source.
func TestInsideTheClusterNothingIsTranslated(t *testing.T) {
	noLeak(t)
	both(t, func(t *testing.T, of func(lab.Pair) netip.Addr) {
		for name, to := range map[string]netip.AddrPort{
			"pod on the other node": netip.AddrPortFrom(of(podOn[1].Addr), podOn[1].Port),
			"pod on the same node":  netip.AddrPortFrom(of(second.Addr), second.Port),
			"the other node":        netip.AddrPortFrom(of(node(1).Addr), hostOn[1].Port),
			"its own node":          netip.AddrPortFrom(of(node(0).Addr), hostOn[0].Port),
		} {
			for _, proto := range []string{"tcp", "udp"} {
				if a := ask(t, podOn[0], proto, to); a.Source.Addr() != of(podOn[0].Addr) {
					t.Errorf("%s over %s saw %s, want the pod %s", name, proto, a.Source, of(podOn[0].Addr))
				}
			}
			if err := podOn[0].Ping(t.Context(), to.Addr()); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

// A pod with the host's network is the node.
func TestHostNetworkPod(t *testing.T) {
	noLeak(t)
	both(t, func(t *testing.T, of func(lab.Pair) netip.Addr) {
		for _, to := range []netip.AddrPort{
			echo(of(cluster.World), "tcp"),
			netip.AddrPortFrom(of(podOn[1].Addr), podOn[1].Port),
			netip.AddrPortFrom(of(node(1).Addr), hostOn[1].Port),
		} {
			if a := ask(t, hostOn[0], "tcp", to); a.Source.Addr() != of(node(0).Addr) {
				t.Errorf("%s saw %s, want the node %s", to, a.Source, of(node(0).Addr))
			}
		}
	})
}

// A Service is judged by the endpoint that kube-proxy chose: pods of any node see
// the client.
func TestClusterIP(t *testing.T) {
	noLeak(t)
	addr, err := serviceAddr(t.Context(), "pods")
	if err != nil {
		t.Fatal(err)
	}
	both(t, func(t *testing.T, of func(lab.Pair) netip.Addr) {
		for _, proto := range []string{"tcp", "udp"} {
			answered := map[string]bool{}
			// The second pod is no endpoint: it never meets itself.
			wait(t, 20*time.Second, func() error {
				a, err := second.Ask(t.Context(), proto, netip.AddrPortFrom(of(addr), 80))
				if err != nil {
					return err
				}
				answered[a.Server] = true
				if a.Source.Addr() != of(second.Addr) {
					t.Fatalf("%s saw %s over %s, want the pod %s", a.Server, a.Source, proto, of(second.Addr))
				}
				return missing(answered, podOn[0].Name, podOn[1].Name)
			})
		}
	})
}

// A NodePort with policy Cluster is answered by pods of both nodes, which see a node;
// with Local only by that of the node itself, which sees the client.
func TestNodePort(t *testing.T) {
	noLeak(t)
	both(t, func(t *testing.T, of func(lab.Pair) netip.Addr) {
		for _, proto := range []string{"tcp", "udp"} {
			for _, n := range shared.Nodes() {
				answered := map[string]bool{}
				wait(t, 20*time.Second, func() error {
					a, err := askFromOutside(t.Context(), proto, netip.AddrPortFrom(of(n.Addr), nodePort))
					if err != nil {
						return err
					}
					answered[a.Server] = true
					return missing(answered, podOn[0].Name, podOn[1].Name)
				})
			}
			wait(t, 20*time.Second, func() error {
				a, err := askFromOutside(t.Context(), proto, netip.AddrPortFrom(of(node(0).Addr), nodePortHere))
				if err == nil && (a.Server != alone.Name || a.Source.Addr() != of(cluster.Gateway)) {
					t.Fatalf("policy Local over %s: %s saw %s, want %s to see %s", proto, a.Server, a.Source, alone.Name, of(cluster.Gateway))
				}
				return err
			})
		}
	})
}

// A hostPort leads to its pod, which sees the client.
func TestHostPort(t *testing.T) {
	noLeak(t)
	// The portmap plugin of the CNI forwards IPv4 and IPv6.
	both(t, func(t *testing.T, of func(lab.Pair) netip.Addr) {
		for _, proto := range []string{"tcp", "udp"} {
			a, err := askFromOutside(t.Context(), proto, netip.AddrPortFrom(of(node(0).Addr), hostPort))
			if err != nil {
				t.Fatal(err)
			}
			if a.Server != second.Name || a.Source.Addr() != of(cluster.Gateway) {
				t.Errorf("%s: %s saw %s, want %s to see %s", proto, a.Server, a.Source, second.Name, of(cluster.Gateway))
			}
		}
	})
}
