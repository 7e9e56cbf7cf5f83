package iptables

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"bauta.dev/bauta/internal/policy"
)

var update = flag.Bool("update", false, "rewrite the goldens in testdata")

// goldenPolicies are those whose rules are in testdata.
func goldenPolicies(t testing.TB) map[string]*policy.Policy {
	return map[string]*policy.Policy{
		"plain": build(t, nil),
		"lists": build(t, func(in *policy.Input) {
			in.Native = rules("10.0.0.0/8", "fd00::/8")
			in.NonMasq = rules("0.0.0.0/0", "172.16.0.0/12", "169.254.0.0/16", "fe80::/10", "::/0", "::102:300/120")
			in.Pods = rules("10.0.2.0/24", "fd00:2::/64")
			in.Nodes = []policy.NodeAddr{
				{Addr: netip.MustParseAddr("192.0.2.3"), Node: "b", Type: policy.InternalIP},
				{Addr: netip.MustParseAddr("2001:db8:2::3"), Node: "b", Type: policy.InternalIP},
			}
		}),
		"routes": build(t, func(in *policy.Input) {
			in.Devices = append(in.Devices, policy.Device{Name: "eth1", Index: 101, IPv4: netip.MustParseAddr("203.0.113.1")})
			in.RouteSources = []policy.RouteSource{
				{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Source: netip.MustParseAddr("192.0.2.9")},
				{Prefix: netip.MustParsePrefix("198.51.0.0/16")},
				{Prefix: netip.MustParsePrefix("198.51.100.0/24"), Source: netip.MustParseAddr("192.0.2.10")},
				{Prefix: netip.MustParsePrefix("2001:db8:99::/48"), Source: netip.MustParseAddr("2001:db8:2::9")},
			}
		}),
		"ports": build(t, func(in *policy.Input) {
			in.Ports = append(ports(1024, 29999), ports(40000, 40000)...)
			in.Ports = append(in.Ports, ports(50000, 65535)...)
		}),
		"unknown-drop": build(t, func(in *policy.Input) { in.UnknownProtocols = policy.UnknownDrop }),
		"unknown-pass": build(t, func(in *policy.Input) {
			in.UnknownProtocols = policy.UnknownPass
			in.Sources = rules("0.0.0.0/0", "::/0")
		}),
		"no-device": build(t, func(in *policy.Input) { in.Devices, in.IPv6 = nil, false }),
	}
}

func TestRenderGoldens(t *testing.T) {
	for name, p := range goldenPolicies(t) {
		for _, f := range families {
			golden(t, fmt.Sprintf("%s-%d", name, int(f)), Render(p, f, RenderOptions{}).String())
		}
	}
	lists := goldenPolicies(t)["lists"]
	golden(t, "lists-without-sets-4", Render(lists, IPv4, RenderOptions{PlainRules: true}).String())
	golden(t, "ports-random-4", Render(goldenPolicies(t)["ports"], IPv4, RenderOptions{RandomFully: true}).String())
	golden(t, "drained-4", drained(IPv4).String())
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".rules")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: not as in the golden (go test -update renews it):\n%s", path, got)
	}
}
