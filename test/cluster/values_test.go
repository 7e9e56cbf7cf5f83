package cluster_test

import (
	"fmt"
	"net/netip"
	"testing"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/test/cluster"
)

// A CIDR given as a value is excluded from masquerading.
func TestNativeRoutingCIDR(t *testing.T) {
	noLeak(t)
	install(t, "ipv4NativeRoutingCIDR="+netip.PrefixFrom(cluster.Friend.V4, 32).String(),
		"ipv6NativeRoutingCIDR="+netip.PrefixFrom(cluster.Friend.V6, 128).String())
	sees(t, cluster.Friend, podOn[0].Addr)
	sees(t, cluster.World, node(0).Addr)
}

// The ConfigMap of a Cilium that runs here is the configuration, with what Bauta
// does not know in it.
func TestCiliumConfigMap(t *testing.T) {
	noLeak(t)
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: cilium-config, namespace: %s}
data:
  enable-ipv4-masquerade: "true"
  enable-ipv6-masquerade: "true"
  ipv4-native-routing-cidr: %s/32
  ipv6-native-routing-cidr: %s/128
  bpf-lb-map-max: "65536"
  kube-proxy-replacement: "false"
  prometheus-serve-addr: ":9962"
`, namespace, cluster.Friend.V4, cluster.Friend.V6))
	t.Cleanup(func() { deleteConfigMap(t, "cilium-config") })
	install(t, "existingConfigDirConfigMap=cilium-config")
	sees(t, cluster.Friend, podOn[0].Addr)
	sees(t, cluster.World, node(0).Addr)
}

// Other nodes can be given the node's address too.
func TestRemoteNodeMasquerade(t *testing.T) {
	noLeak(t)
	install(t, "remoteNodeMasquerade=all")
	both(t, func(t *testing.T, of func(lab.Pair) netip.Addr) {
		to := netip.AddrPortFrom(of(node(1).Addr), hostOn[1].Port)
		if a := ask(t, podOn[0], "tcp", to); a.Source.Addr() != of(node(0).Addr) {
			t.Errorf("the other node saw %s, want the pod's node %s", a.Source, of(node(0).Addr))
		}
		to = netip.AddrPortFrom(of(podOn[1].Addr), podOn[1].Port)
		if a := ask(t, podOn[0], "tcp", to); a.Source.Addr() != of(podOn[0].Addr) {
			t.Errorf("a pod of the other node saw %s, want the pod %s", a.Source, of(podOn[0].Addr))
		}
	})
}

// Iptables mode and back, by a value, under load: what the outside and other nodes
// see is the same, and no connection breaks on the way.
func TestModes(t *testing.T) {
	noLeak(t)
	install(t)
	l := startLoad(t, 0, 1)
	for _, change := range []struct {
		mode   string
		values []string
	}{
		{agent.ModeIPTables, []string{"bpf.masquerade=false"}},
		{agent.ModeBPF, []string{"image.variant=iptables"}}, // which can take over from iptables
	} {
		install(t, change.values...)
		l.alive(t)
		for _, n := range shared.Nodes() {
			s, err := statusOf(t, n)
			if err != nil {
				t.Fatal(err)
			}
			if s.Masquerading.Mode != change.mode {
				t.Errorf("%s: mode %s, want %s", n.Name, s.Masquerading.Mode, change.mode)
			}
		}
		t.Run(change.mode, func(t *testing.T) {
			t.Run("World", TestWorldSeesTheNode)
			t.Run("Cluster", TestInsideTheClusterNothingIsTranslated)
			t.Run("NodePort", TestNodePort)
		})
	}
	l.unharmed(t)
}
