package agent

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/nodes/nodestest"
)

// kubeNode is a node of a cluster.
type kubeNode struct {
	*node
	api    *nodestest.Server
	listen func() (stop func())
	away   func() // the API server's end, until listen
}

const ownName = "node-a"

// newKubeNode is a node whose agent has all its source ranges from an API server in the
// node's network namespace.
func newKubeNode(t *testing.T) *kubeNode {
	t.Helper()
	n := &kubeNode{node: newNode(t), api: nodestest.New()}
	address := ""
	n.listen = func() func() {
		var l net.Listener
		err := n.Node.Do(func() (err error) {
			l, err = net.Listen("tcp", orDefault(address, "127.0.0.1:0"))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		address = l.Addr().String()
		server := &http.Server{Handler: n.api}
		done := make(chan struct{})
		go func() {
			defer close(done)
			server.Serve(l)
		}()
		return func() {
			server.Close()
			<-done
		}
	}
	n.away = n.listen()
	t.Cleanup(func() { n.away() })
	config := filepath.Join(t.TempDir(), "kubeconfig")
	write(t, config, nodestest.Kubeconfig("http://"+address, "secret"))
	delete(n.Flags, "pod-cidrs")
	delete(n.Flags, "enable-ip-masq-agent")
	delete(n.Flags, "ip-masq-agent-config-path")
	n.Flags["enable-k8s"], n.Flags["k8s-kubeconfig-path"], n.Flags["k8s-node-name"] = "true", config, ownName
	return n
}

// nodeAddrs are the addresses of other nodes in the kernel.
func (n *kubeNode) nodeAddrs(t *testing.T) []netip.Addr {
	t.Helper()
	var list []netip.Addr
	err := n.Node.Do(func() error {
		k, err := Inspect(t.Context(), n.BPFRoot, n.RunDir)
		if err != nil {
			return err
		}
		defer k.Close()
		list, err = k.NodeAddrs()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func (n *kubeNode) awaitNodes(t *testing.T, timeout time.Duration, want ...string) {
	t.Helper()
	var list []netip.Addr
	for _, a := range want {
		list = append(list, netip.MustParseAddr(a))
	}
	labtest.Eventually(t, timeout, func() error {
		if got := n.nodeAddrs(t); !slices.Equal(got, list) {
			return fmt.Errorf("addresses of nodes %v, want %v", got, want)
		}
		return nil
	})
}

func TestAgentOfACluster(t *testing.T) {
	n := newKubeNode(t)
	n.api.Put(nodestest.Node("node-b", "10.0.2.0/24,fd00:2::/64", "InternalIP=192.0.2.77"))
	const taint = "node.bauta.dev/agent-not-ready"
	n.Flags["k8s-startup-taint"] = taint
	tainted := func(ranges string) *corev1.Node {
		own := nodestest.Node(ownName, ranges, "InternalIP="+n.NodeAddr.V4.String())
		own.Spec.Taints = []corev1.Taint{{Key: taint, Effect: corev1.TaintEffectNoSchedule}, {Key: "other", Effect: corev1.TaintEffectNoExecute}}
		return own
	}
	_, stop := n.start(t)
	// Its own Node object is not there yet, then it has no ranges: the agent waits.
	n.await(t, 20*time.Second, func(s Status) bool { return s.Agent.Waiting != "" && s.Kubernetes.Synced })
	n.api.Put(tainted(""))
	n.await(t, 2*time.Second, func(s Status) bool { return s.Kubernetes.Nodes == 2 && !s.Agent.Ready && len(s.Degraded()) > 0 })
	if len(n.api.Get(ownName).Spec.Taints) != 2 {
		t.Error("the taint was lifted before a policy was in force")
	}
	n.api.Put(tainted("10.0.1.0/24,fd00:1::/64"))
	s := n.await(t, 5*time.Second, healthyStatus)
	labtest.Eventually(t, 2*time.Second, func() error {
		if taints := n.api.Get(ownName).Spec.Taints; len(taints) != 1 || taints[0].Key != "other" {
			return fmt.Errorf("taints %v", taints)
		}
		return nil
	})
	if got := rules(append(s.Sources.IPv4.Ranges, s.Sources.IPv6.Ranges...)); got != "10.0.1.0/24 (node node-a), fd00:1::/64 (node node-a)" {
		t.Errorf("sources %s", got)
	}
	n.awaitNodes(t, time.Second, "192.0.2.77")

	n.api.Put(nodestest.Node("node-c", "10.0.3.0/24", "InternalIP=192.0.2.78", "ExternalIP=2001:db8::78"))
	n.awaitNodes(t, time.Second, "192.0.2.77", "192.0.2.78", "2001:db8::78")
	n.api.Put(nodestest.Node("node-b", "10.0.2.0/24", "InternalIP=192.0.2.79"))
	n.awaitNodes(t, time.Second, "192.0.2.78", "192.0.2.79", "2001:db8::78")
	n.api.Delete("node-c")
	n.awaitNodes(t, time.Second, "192.0.2.79")
	ip := labtest.Tool(t, "ip")
	if out, err := n.Node.Run(t.Context(), ip, "addr", "del", n.NodeAddr.V4.String()+"/24", "dev", "eth0"); err != nil {
		t.Fatal(err, out)
	}
	labtest.Eventually(t, 5*time.Second, func() error {
		want := "Warning MasqueradeAddressChanged node-a x1: device eth0: IPv4 masquerade address none, was " + n.NodeAddr.V4.String()
		if got := n.api.Events(); !slices.Contains(got, want) {
			return fmt.Errorf("events %q", got)
		}
		return nil
	})
	stop(unix.SIGTERM)
}

// Without the API server all goes on, with the same agent and with one that starts then; when
// it is back, what it says then is in force.
func TestAgentWithoutAPIServer(t *testing.T) {
	for mode, bpf := range map[string]string{"eBPF": "true", "iptables": "false"} {
		t.Run(mode, func(t *testing.T) {
			n := newKubeNode(t)
			n.Flags["enable-bpf-masquerade"] = bpf
			own := nodestest.Node(ownName, "10.0.1.0/24,fd00:1::/64", "InternalIP="+n.NodeAddr.V4.String())
			n.api.Put(own, nodestest.Node("node-b", "10.0.2.0/24,fd00:2::/64", "InternalIP=192.0.2.77", "InternalIP=2001:db8::77"))
			_, stop := n.start(t)
			n.await(t, 20*time.Second, healthyStatus)
			n.awaitNodes(t, 5*time.Second, "192.0.2.77", "2001:db8::77")

			n.away()
			s := n.await(t, 10*time.Second, func(s Status) bool { return s.Kubernetes.Error != "" })
			if !s.Agent.Ready || len(s.Degraded()) > 0 {
				t.Errorf("away: %v", s.Degraded())
			}
			stop(unix.SIGKILL)
			_, stop = n.start(t)
			s = n.await(t, 20*time.Second, healthyStatus)
			if s.Kubernetes.Synced || s.Nodes.Known != 1 || rules(s.Sources.IPv4.Ranges) != "10.0.1.0/24 (node node-a)" {
				t.Errorf("restarted while it is away: %+v %+v", s.Kubernetes, s.Sources)
			}
			n.awaitNodes(t, 0, "192.0.2.77", "2001:db8::77")

			n.api.Restore(5, own, nodestest.Node("node-c", "10.0.3.0/24", "InternalIP=192.0.2.78"))
			n.away = n.listen()
			n.awaitNodes(t, 30*time.Second, "192.0.2.78") // by back-off
			n.await(t, 5*time.Second, func(s Status) bool { return s.Kubernetes.Synced && s.Kubernetes.Error == "" && healthyStatus(s) })
			stop(unix.SIGTERM)
		})
	}
}

// An agent that is told to take over what it took over long ago starts without the API server.
func TestTakenOverWithoutAPIServer(t *testing.T) {
	n := newKubeNode(t)
	n.Flags["take-over"] = "IP-MASQ-AGENT"
	n.api.Put(nodestest.Node(ownName, "10.0.1.0/24,fd00:1::/64", "InternalIP="+n.NodeAddr.V4.String()))
	for _, args := range []string{"-N IP-MASQ-AGENT", "-A POSTROUTING -j IP-MASQ-AGENT", "-A IP-MASQ-AGENT -j MASQUERADE"} {
		if out, err := n.Node.Run(t.Context(), labtest.Tool(t, "iptables"), append([]string{"-t", "nat"}, strings.Fields(args)...)...); err != nil {
			t.Fatal(err, out)
		}
	}
	_, stop := n.start(t)
	n.await(t, 20*time.Second, healthyStatus)
	stop(unix.SIGTERM)
	n.away()
	_, stop = n.start(t)
	n.await(t, 20*time.Second, healthyStatus)
	stop(unix.SIGTERM)
}
