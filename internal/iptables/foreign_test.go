package iptables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
)

func fields(s string) []string { return strings.Fields(s) }

var podSources = []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24"), netip.MustParsePrefix("fd00:1::/64")}

// What other programs write is told apart: what competes with us, and what does not.
func TestForeign(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		n := tables(t, labtest.NewNS(t), o)
		n.apply(build(t, listed))
		n.feed(`*nat
:KUBE-POSTROUTING - [0:0]
:IP-MASQ-AGENT - [0:0]
:DOCKER - [0:0]
:NOTHING - [0:0]
:SOME - [0:0]
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -m comment --comment "ip-masq-agent: -j MASQUERADE" -m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT
-A POSTROUTING -s 10.0.1.7/32 -o eth0 -j SNAT --to-source 192.0.2.99
-A POSTROUTING ! -s 10.0.0.0/8 -j MASQUERADE
-A POSTROUTING ! -s 10.0.1.128/25 -j MASQUERADE
-A POSTROUTING -m mark --mark 0x1 -j MASQUERADE
-A POSTROUTING -j NOTHING
-A POSTROUTING -j SOME
-A NOTHING -d 0.0.0.0/0 -m comment --comment "everything is excluded: -j MASQUERADE" -j RETURN
-A NOTHING -j MASQUERADE
-A SOME -o eth9 -j RETURN
-A SOME -j MASQUERADE
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A IP-MASQ-AGENT -d 10.0.0.0/8 -j RETURN
-A IP-MASQ-AGENT -m comment --comment "ip-masq-agent: outbound traffic is subject to MASQUERADE" -j MASQUERADE
COMMIT
`, n.ipt(IPv4, "-restore"), "--noflush")
		n.feed("*nat\n-A POSTROUTING -s fd00::/8 -j MASQUERADE\nCOMMIT\n", n.ipt(IPv6, "-restore"), "--noflush")
		n.feed(`table inet gateway {
	chain post {
		type nat hook postrouting priority 100
		meta mark 7 masquerade
		ip saddr 10.0.1.0/24 oifname "eth0" masquerade
		ip saddr { 172.18.0.0/16, 172.19.0.1 } masquerade
		ip6 saddr != fd00:1::/64 masquerade
		snat ip to 192.0.2.5
	}
}
table ip kube-proxy {
	chain masquerading {
		type nat hook postrouting priority 100
		meta mark and 0x4000 == 0 return
		masquerade fully-random
	}
}
`, "nft", "-f", "-")
		want := []string{
			`IPv4 nat IP-MASQ-AGENT: -m comment --comment "ip-masq-agent: outbound traffic is subject to MASQUERADE" -j MASQUERADE`,
			`IPv4 nat POSTROUTING: -s 10.0.1.7/32 -o eth0 -j SNAT --to-source 192.0.2.99`,
			`IPv4 nat POSTROUTING: ! -s 10.0.1.128/25 -j MASQUERADE`,
			`IPv4 nat SOME: -j MASQUERADE`,
			`IPv6 nat POSTROUTING: -s fd00::/8 -j MASQUERADE`,
			`IPv4 inet gateway post: ip saddr 10.0.1.0/24 oifname "eth0" masquerade`,
			`IPv4 inet gateway post: snat ip to 192.0.2.5`,
			`IPv6 inet gateway post: snat ip to 192.0.2.5`,
		}
		var got []string
		n.do(func() error {
			list, err := Foreign(context.Background(), Options{}, podSources)
			for _, r := range list {
				got = append(got, fmt.Sprintf("%s %s %s: %s", r.Family, r.Table, r.Chain, r.Rule))
			}
			return err
		})
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		// Each can be removed by what was said about it.
		n.do(func() error {
			for range want {
				list, err := Foreign(context.Background(), Options{}, podSources)
				if err != nil || len(list) == 0 {
					return err
				}
				if list[0].Backend != o.Backend && list[0].Backend != "" {
					t.Errorf("%v is said to be of %s", list[0], list[0].Backend)
				}
				if err := RemoveForeign(context.Background(), o, list[0]); err != nil {
					return err
				}
			}
			list, err := Foreign(context.Background(), Options{}, podSources)
			if len(list) > 0 {
				t.Errorf("left: %v", list)
			}
			return err
		})
		n.right()
	})
}

// Looking at a node changes nothing: not even the legacy tables are made.
func TestReadersMakeNothing(t *testing.T) {
	labtest.Root(t)
	n := &inNS{t: t, ns: labtest.NewNS(t), o: Options{env: ownLock(t)}}
	ctx := context.Background()
	n.do(func() error {
		_, err := Open(context.Background(), n.o)
		return err
	})
	n.do(func() error {
		if _, err := Inspect(ctx, n.o); !errors.Is(err, ErrNone) {
			t.Errorf("inspect: %v", err)
		}
		list, err := Foreign(ctx, n.o, podSources)
		if len(list) > 0 {
			t.Errorf("foreign: %v", list)
		}
		return err
	})
	n.do(func() error {
		removed, err := Remove(ctx, n.o)
		if len(removed) > 0 {
			t.Errorf("removed: %v", removed)
		}
		return err
	})
	if out := n.run("iptables-legacy-save") + n.run("ip6tables-legacy-save") + n.run("nft", "list", "ruleset") + n.run("ipset", "list", "-n"); out != "" {
		t.Errorf("made:\n%s", out)
	}
}

func TestInspect(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		n := tables(t, labtest.NewNS(t), o)
		p := goldenPolicies(t)["lists"]
		n.apply(p)
		n.do(func() error {
			i, err := Inspect(context.Background(), Options{})
			if err != nil {
				return err
			}
			defer i.Close()
			prefixes, err1 := i.Exclusions()
			nodes, err2 := i.NodeAddrs()
			devices, err3 := i.Devices()
			for _, c := range []struct{ what, got, want string }{
				{"backend", string(i.Backend()), string(o.Backend)},
				{"exclusions", fmt.Sprint(prefixes), "[0.0.0.0/0 169.254.0.0/16 172.16.0.0/12 ::/0 ::1.2.3.0/120 fe80::/10]"},
				{"nodes", fmt.Sprint(nodes), "[192.0.2.3 2001:db8:2::3]"},
				{"devices", fmt.Sprint(devices), "[eth0]"},
				{"draining", fmt.Sprint(i.Draining()), "false"},
			} {
				if c.got != strings.ReplaceAll(c.want, "::1.2.3.0", "::102:300") {
					t.Errorf("%s: %s, want %s", c.what, c.got, c.want)
				}
			}
			return errors.Join(err1, err2, err3)
		})
	})
}

// Where no packet comes to our chains, in one table or family, nothing is masqueraded.
func TestInspectWithoutJump(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		for _, table := range tableNames {
			n := tables(t, labtest.NewNS(t), o)
			n.apply(build(t, listed))
			n.run(n.ipt(IPv6, ""), "-t", table, "-D", "POSTROUTING", "-j", "BAUTA-POSTROUTING")
			n.do(func() error {
				i, err := Inspect(context.Background(), o)
				if err != nil {
					return err
				}
				if devices, err := i.Devices(); err != nil || len(devices) > 0 {
					t.Errorf("without the jump of %s: %v, %v", table, devices, err)
				}
				return nil
			})
		}
	})
}

// The backend is chosen as the wrappers of distributions do.
func TestDetect(t *testing.T) {
	labtest.Root(t)
	hint := func(b Backend, f Family, chain string) [3]string {
		return [3]string{f.binary() + "-" + string(b), "-t mangle -N " + chain}
	}
	rule := func(b Backend) [3]string { return [3]string{"iptables-" + string(b), "-A FORWARD -j ACCEPT"} }
	plain := Options{}.plainBackend(t.Context())
	for _, c := range []struct {
		name string
		have [][3]string
		want Backend
	}{
		{"nothing: what iptables is", nil, plain},
		{"a rule of legacy", [][3]string{rule(Legacy)}, Legacy},
		{"more of nft", [][3]string{rule(Legacy), rule(NFT), rule(NFT)}, NFT},
		{"kubelet's hint", [][3]string{rule(NFT), hint(Legacy, IPv4, "KUBE-IPTABLES-HINT")}, Legacy},
		{"kubelet's canary, in IPv6 only", [][3]string{rule(Legacy), hint(NFT, IPv6, "KUBE-KUBELET-CANARY")}, NFT},
		{"as many", [][3]string{rule(Legacy), rule(NFT)}, plain},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := Options{env: ownLock(t)}
			n := &inNS{t: t, ns: labtest.NewNS(t), o: o}
			for _, cmd := range c.have {
				n.run(cmd[0], strings.Fields(cmd[1])...)
			}
			n.do(func() (err error) {
				n.tables, err = Open(context.Background(), o)
				return err
			})
			if got := n.tables.Backend(); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
	// Our own rules of before count where nothing else says anything.
	n := &inNS{t: t, ns: labtest.NewNS(t), o: Options{Backend: Legacy, env: ownLock(t)}}
	n.do(func() (err error) {
		n.tables, err = Open(context.Background(), n.o)
		return err
	})
	n.apply(build(t, nil))
	n.do(func() error {
		again, err := Open(context.Background(), Options{})
		if err == nil && again.Backend() != Legacy {
			t.Errorf("a new agent takes %s", again.Backend())
		}
		return err
	})
}
