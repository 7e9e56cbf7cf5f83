package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/test/cluster"
)

// traces is what Bauta may leave on a node: programs on its device, pins, files,
// and rules, one a line.
func traces(ctx context.Context, n *cluster.Node) (list []string, err error) {
	for _, argv := range [][]string{
		{"sh", "-c", "find /sys/fs/bpf -mindepth 1; ! test -e /run/bauta || find /run/bauta -mindepth 1"},
		{"sh", "-c", "tc qdisc show dev eth0; tc filter show dev eth0 ingress; tc filter show dev eth0 egress"},
		{"sh", "-c", "for i in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do $i-save | grep -i bauta; done; nft list tables; ipset list -n 2>/dev/null; true"},
	} {
		out, err := n.Run(ctx, argv...)
		if err != nil {
			return nil, err
		}
		list = append(list, lines(out)...)
	}
	index, err := n.NS().Index("eth0")
	if err != nil {
		return nil, err
	}
	for _, hook := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		err := n.NS().Do(func() error {
			found, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: hook})
			if err == nil && len(found.Programs) > 0 {
				list = append(list, fmt.Sprintf("%d programs on %v", len(found.Programs), hook))
			}
			return err
		})
		if err != nil && !errors.Is(err, ebpf.ErrNotSupported) {
			return nil, err
		}
	}
	slices.Sort(list)
	return slices.Compact(list), nil
}

// The release and the clean-up that its documentation names leave nodes as they
// were before the installation.
func TestUninstallLeavesNothing(t *testing.T) {
	for mode, values := range map[string][]string{
		"eBPF": nil, "iptables": {"bpf.masquerade=false"},
	} {
		t.Run(mode, func(t *testing.T) { leavesNothing(t, values) })
	}
	install(t)
	TestWorldSeesTheNode(t)
}

// cleanUp removes what a release left that was uninstalled, as its documentation says.
func cleanUp(t *testing.T) {
	t.Helper()
	install(t, "cleanup.enabled=true")
	uninstall(t)
}

func leavesNothing(t *testing.T, values []string) {
	noLeak(t)
	install(t, values...)
	uninstall(t)
	for i, n := range shared.Nodes() {
		got, err := traces(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		if slices.Equal(got, untouched[i]) {
			t.Errorf("%s: nothing of Bauta is there without an agent: what is to be cleaned up?", n.Name)
		}
	}
	// What masquerades without an agent goes on until it is removed.
	TestWorldSeesTheNode(t)

	cleanUp(t)
	for i, n := range shared.Nodes() {
		wait(t, 10*time.Second, func() error {
			got, err := traces(t.Context(), n)
			if err == nil && !slices.Equal(got, untouched[i]) {
				err = fmt.Errorf("%s has\n%s\nbefore the installation it had\n%s", n.Name, strings.Join(got, "\n"), strings.Join(untouched[i], "\n"))
			}
			return err
		})
	}
	for _, kind := range []string{"clusterroles", "clusterrolebindings", "configmaps", "serviceaccounts", "daemonsets"} {
		out, err := shared.Kubectl(t.Context(), "", "get", kind, "--all-namespaces", "-o", "name", "-l", "app.kubernetes.io/name=bauta")
		if err != nil || out != "" {
			t.Errorf("%s that are left: %q, %v", kind, out, err)
		}
	}
}

// The proof that these tests can fail: without Bauta a pod is not answered, and the
// outside has seen its address.
func TestWithoutBautaPodsLeak(t *testing.T) {
	install(t)
	uninstall(t)
	cleanUp(t)
	both(t, func(t *testing.T, of func(lab.Pair) netip.Addr) {
		before, err := shared.Fabric.Leaks()
		if err != nil {
			t.Fatal(err)
		}
		if a, err := podOn[0].Ask(t.Context(), "tcp", echo(of(cluster.World), "tcp")); err == nil {
			t.Errorf("the outside answered, and saw %s", a.Source)
		}
		after, err := shared.Fabric.Leaks()
		if err != nil || after <= before {
			t.Errorf("%d leaks were seen, then %d: %v", before, after, err)
		}
	})
	install(t)
}
