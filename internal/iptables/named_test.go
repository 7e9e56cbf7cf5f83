package iptables

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
)

const masqAgentRules = `*nat
:IP-MASQ-AGENT - [0:0]
:MARKED - [0:0]
:DEEP - [0:0]
:BETWEEN - [0:0]
:LONELY - [0:0]
-A POSTROUTING -m comment --comment "ip-masq-agent: ensure nat POSTROUTING directs all non-LOCAL traffic" -m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT
-A POSTROUTING -s 10.0.1.0/24 ! -d 10.0.0.0/8 -o eth1 -j MASQUERADE
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -o twice -j MASQUERADE
-A POSTROUTING -o twice -j MASQUERADE
-A POSTROUTING -o eth0 -j ACCEPT
-A POSTROUTING -j MARKED
-A POSTROUTING -j BETWEEN
-A MARKED -j MARK --set-xmark 0x1/0x1
-A MARKED -j MASQUERADE
-A BETWEEN -j DEEP
-A DEEP -o eth7 -j MASQUERADE
-A LONELY -o eth8 -j MASQUERADE
-A IP-MASQ-AGENT -d 10.0.0.0/8 -m comment --comment "ip-masq-agent: local traffic" -j RETURN
-A IP-MASQ-AGENT -m comment --comment "ip-masq-agent: outbound traffic" -j MASQUERADE --random-fully
COMMIT
`

const nativeRules = `table ip nat {
	chain postrouting {
		type nat hook postrouting priority 100
		ip saddr 10.0.1.0/24 ip daddr != 10.0.0.0/8 counter masquerade
		oifname "eth3" masquerade
		oifname "eth4" accept
	}
}
table inet both {
	chain post {
		type nat hook postrouting priority 100
		oifname "eth5" masquerade
	}
}
`

// A name means a chain or a rule, in the words of the listings, and what it means is removed and
// nothing else.
func TestNamed(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		backend := "iptables-" + string(o.Backend)
		for _, c := range []struct {
			name, does string // does: what is removed, a line each
			err        error
		}{
			{"IP-MASQ-AGENT", `IPv4, BACKEND, table nat: rule POSTROUTING -m comment --comment "ip-masq-agent: ensure nat POSTROUTING directs all non-LOCAL traffic" -m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT
IPv4, BACKEND, table nat: chain IP-MASQ-AGENT, 2 rules
IPv6, BACKEND, table nat: rule POSTROUTING -j IP-MASQ-AGENT
IPv6, BACKEND, table nat: chain IP-MASQ-AGENT, 1 rules`, nil},
			{"-A POSTROUTING -s 10.0.1.0/24 ! -d 10.0.0.0/8 -o eth1 -j MASQUERADE",
				"IPv4, BACKEND, table nat: chain POSTROUTING: rule -s 10.0.1.0/24 ! -d 10.0.0.0/8 -o eth1 -j MASQUERADE", nil},
			{"iptables -t nat -A POSTROUTING -s 10.0.1.0/24 ! -d 10.0.0.0/8 -o eth1 -j MASQUERADE",
				"IPv4, BACKEND, table nat: chain POSTROUTING: rule -s 10.0.1.0/24 ! -d 10.0.0.0/8 -o eth1 -j MASQUERADE", nil},
			{"IPv4, table nat, chain POSTROUTING: -s 10.0.1.0/24 ! -d 10.0.0.0/8 -o eth1 -j MASQUERADE",
				"IPv4, BACKEND, table nat: chain POSTROUTING: rule -s 10.0.1.0/24 ! -d 10.0.0.0/8 -o eth1 -j MASQUERADE", nil},
			{`ip saddr 10.0.1.0/24 ip daddr != 10.0.0.0/8 counter packets 7 bytes 99 masquerade # handle 12`,
				"nft, table ip nat, chain postrouting: rule ip saddr 10.0.1.0/24 ip daddr != 10.0.0.0/8 counter masquerade", nil},
			{`IPv4, table ip nat, chain postrouting: oifname "eth3" masquerade`, `nft, table ip nat, chain postrouting: rule oifname "eth3" masquerade`, nil},
			{"oifname eth5 masquerade", `nft, table inet both, chain post: rule oifname "eth5" masquerade`, nil},
			{"-A POSTROUTING -o nowhere -j MASQUERADE", "", ErrNotFound},
			{"IP-MASQ", "", ErrNotFound},
			{"LONELY", "", ErrNotFound},
			{"POSTROUTING", "", ErrNotFound},
			{"BAUTA-POSTROUTING", "", ErrNotFound},
			{"masquerade", "", ErrNotFound},
			{"-A POSTROUTING -o twice -j MASQUERADE", "", ErrAmbiguous},
			{"-A POSTROUTING -o eth0 -j ACCEPT", "", ErrUnfit},
			{"-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE", "", ErrUnfit},
			{"MARKED", "", ErrUnfit},
			{"BETWEEN", "", ErrUnfit},
			{"DEEP", "", ErrUnfit},
		} {
			t.Run(c.name, func(t *testing.T) {
				n := tables(t, labtest.NewNS(t), o)
				n.apply(build(t, listed))
				n.feed(masqAgentRules, n.ipt(IPv4, "-restore"), "--noflush")
				n.feed("*nat\n:IP-MASQ-AGENT - [0:0]\n-A POSTROUTING -j IP-MASQ-AGENT\n-A IP-MASQ-AGENT -j MASQUERADE\nCOMMIT\n", n.ipt(IPv6, "-restore"), "--noflush")
				n.feed(nativeRules, "nft", "-f", "-")
				before := n.run("nft", "list", "ruleset") + n.run("iptables-legacy-save") + n.run("ip6tables-legacy-save")
				var removed []string
				n.do(func() error {
					found, err := FindNamed(context.Background(), Options{}, c.name, podSources)
					if !errors.Is(err, c.err) {
						t.Fatalf("%v, want %v", err, c.err)
					}
					if err != nil {
						t.Log(err)
						return nil
					}
					again := n.run("nft", "list", "ruleset") + n.run("iptables-legacy-save") + n.run("ip6tables-legacy-save")
					if rulesOnly(before) != rulesOnly(again) {
						t.Error("looking changed something")
					}
					removed, err = RemoveNamed(context.Background(), o, c.name, podSources)
					if got := strings.ReplaceAll(strings.Join(removed, "\n"), backend, "BACKEND"); got != c.does || strings.Join(found.Removals, "\n") != strings.Join(removed, "\n") {
						t.Errorf("removed\n%s\nwant\n%s", got, c.does)
					}
					return err
				})
				after := n.run("nft", "list", "ruleset") + n.run("iptables-legacy-save") + n.run("ip6tables-legacy-save")
				if lines := strings.Count(rulesOnly(before), "\n") - strings.Count(rulesOnly(after), "\n"); c.err == nil && (lines < 1 || lines > 11) || c.err != nil && lines != 0 {
					t.Errorf("%d lines less:\n%s", lines, after)
				}
				n.right()
				n.do(func() error {
					if again, err := RemoveNamed(context.Background(), o, c.name, podSources); len(again) > 0 || c.err == nil && err != nil {
						t.Errorf("again: %v, %v", again, err)
					}
					return nil
				})
			})
		}
	})
}

// A family in which a chain, or a rule, masquerades nothing of ours is left alone.
func TestNamedOneFamily(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		n := tables(t, labtest.NewNS(t), o)
		rules := "*nat\n:IP-MASQ-AGENT - [0:0]\n-A POSTROUTING -j IP-MASQ-AGENT\n-A POSTROUTING -o eth1 -j MASQUERADE\n-A IP-MASQ-AGENT -j MASQUERADE\nCOMMIT\n"
		for _, f := range families {
			n.feed(rules, n.ipt(f, "-restore"), "--noflush")
		}
		before := n.run("ip6tables-" + string(o.Backend) + "-save")
		for _, name := range []string{"IP-MASQ-AGENT", "-A POSTROUTING -o eth1 -j MASQUERADE"} {
			n.do(func() error {
				removed, err := RemoveNamed(context.Background(), o, name, podSources[:1])
				if len(removed) == 0 || strings.Contains(strings.Join(removed, "\n"), "IPv6") {
					t.Errorf("%s: removed %q", name, removed)
				}
				return err
			})
		}
		if after := n.run("ip6tables-" + string(o.Backend) + "-save"); rulesOnly(before) != rulesOnly(after) {
			t.Errorf("the other family has now\n%s", after)
		}
		if out := n.run("iptables-" + string(o.Backend) + "-save"); strings.Contains(out, "MASQ") {
			t.Errorf("left:\n%s", out)
		}
	})
}

func TestGivesAndWithin(t *testing.T) {
	pods := podSources
	for _, c := range []struct {
		rule          string
		gives, within bool // 192.0.2.9
	}{
		{"-s 10.0.1.0/24 -j SNAT --to-source 192.0.2.9", true, true},
		{"-s 10.0.1.7/32 -j SNAT --to-source 192.0.2.9:1024-2047 --random", true, true},
		{"-s 10.0.0.0/8 -j SNAT --to-source 192.0.2.1-192.0.2.20:1024-2047", true, false},
		{"! -s 10.0.1.0/24 -j SNAT --to-source 192.0.2.1-192.0.2.8", false, false},
		{"-o eth0 -j MASQUERADE --to-ports 1024-2047", false, false},
		{`oifname "eth0" ip saddr 10.0.1.7 snat to 192.0.2.9`, true, true},
		{"ip saddr 10.0.1.0/24 snat ip to 192.0.2.1-192.0.2.9:1024-2047", true, true},
		{"ip6 saddr fd00:1::/64 snat to [2001:db8::1]:1024-2047", false, true},
		{"ip saddr { 10.0.1.0/24, 10.9.0.0/24 } masquerade", false, false},
	} {
		n := Named{Rules: []ForeignRule{{Rule: c.rule}}}
		if gives, within := n.Gives(netip.MustParseAddr("192.0.2.9")), n.Rules[0].Within(pods); gives != c.gives || within != c.within {
			t.Errorf("%s: gives %t, within %t", c.rule, gives, within)
		}
	}
}

// rulesOnly leaves out what changes by itself.
func rulesOnly(listing string) string {
	var b strings.Builder
	for line := range strings.Lines(listing) {
		if !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, ":") {
			b.WriteString(counted.ReplaceAllString(line, "counter"))
		}
	}
	return b.String()
}
