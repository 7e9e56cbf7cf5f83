package e2e_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// foreignSetup is how another program masquerades the pods, and what a user calls it.
type foreignSetup struct {
	kind    string
	backend string
	install func(n *node)
	names   []string
	gone    string // matches the lines of listings that are gone afterwards
}

// others are rules of others in the same tables.
const othersRules = `:DOCKER - [0:0]
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -o eth9 -m comment --comment "IP MASQ AGENT -j MASQUERADE" -j DOCKER
-A DOCKER -i docker0 -j RETURN
`

const masqAgentChain = `:IP-MASQ-AGENT - [0:0]
-A POSTROUTING -m comment --comment "ip-masq-agent: ensure nat POSTROUTING directs all non-LOCAL destination traffic to our custom IP-MASQ-AGENT chain" -m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT
-A IP-MASQ-AGENT -d %s -m comment --comment "ip-masq-agent: local traffic is not subject to MASQUERADE" -j RETURN
-A IP-MASQ-AGENT -m comment --comment "ip-masq-agent: outbound traffic is subject to MASQUERADE (must be last in chain)" -j MASQUERADE
`

const nativeTables = `table ip nat {
	chain postrouting {
		type nat hook postrouting priority 100
		oifname "eth9" accept
		ip saddr 10.0.1.0/24 ip daddr != 10.0.0.0/8 counter masquerade
		ip saddr 172.17.0.0/16 masquerade
	}
}
table ip6 nat {
	chain postrouting {
		type nat hook postrouting priority 100
		ip6 saddr fd00:1::/64 ip6 daddr != fc00::/7 masquerade
	}
}
`

// restore feeds iptables-restore for both families.
func (n *node) restore(backend, rules4, rules6 string) {
	n.t.Helper()
	for family, rules := range map[string]string{"iptables": rules4, "ip6tables": rules6} {
		path := n.write("rules", "*nat\n"+rules+"COMMIT\n")
		n.tables(family+"-"+backend+"-restore", "--noflush", path)
	}
}

func foreignSetups() (list []foreignSetup) {
	for _, backend := range ruleBackends {
		list = append(list, foreignSetup{"chain", backend, func(n *node) {
			n.restore(backend, othersRules+fmt.Sprintf(masqAgentChain, "10.0.0.0/8"), fmt.Sprintf(masqAgentChain, "fc00::/7"))
		}, []string{"IP-MASQ-AGENT"}, `IP-MASQ-AGENT( |$)`})
		plain4, plain6 := "-A POSTROUTING -s 10.0.1.0/24 ! -d 10.0.0.0/8 -j MASQUERADE", "-A POSTROUTING -s fd00:1::/64 ! -d fc00::/7 -j MASQUERADE"
		list = append(list, foreignSetup{"rule", backend, func(n *node) {
			n.restore(backend, othersRules+plain4+"\n", plain6+"\n")
		}, []string{plain4, plain6}, `-s (10.0.1.0/24|fd00:1::/64) ! -d `})
	}
	return append(list, foreignSetup{"native", "nft", func(n *node) { n.tables("nft", "-f", n.write("rules", nativeTables)) },
		[]string{"ip saddr 10.0.1.0/24 ip daddr != 10.0.0.0/8 counter packets 3 bytes 180 masquerade",
			"IPv6, table ip6 nat, chain postrouting: ip6 saddr fd00:1::/64 ip6 daddr != fc00::/7 masquerade"}, `saddr (10.0.1.0/24|fd00:1::/64) `})
}

// eachForeign runs a test on a node for each setup.
func eachForeign(t *testing.T, test func(t *testing.T, n *node, f foreignSetup)) {
	t.Helper()
	for _, f := range foreignSetups() {
		t.Run(f.kind+"/"+f.backend, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, lab.Options{Pods: 2})
			n.env = append(n.env, n.lockFile())
			f.install(n)
			test(t, n, f)
		})
	}
}

// wantGone compares the rules of before with those of now: what was taken over is gone, and
// nothing else.
func (n *node) wantGone(before string, f foreignSetup) {
	n.t.Helper()
	gone := regexp.MustCompile(f.gone)
	// What nft shows of rules of iptables is in the other listings, in words.
	cut := func(listing string) (lines []string) {
		if f.kind != "native" {
			listing, _, _ = strings.Cut(listing, "$ nft")
		}
		return slices.DeleteFunc(strings.Split(listing, "\n"), func(line string) bool { return line == "" })
	}
	want := slices.DeleteFunc(cut(before), gone.MatchString)
	if len(want) == len(cut(before)) {
		n.t.Errorf("the listing does not show what is to be removed:\n%s", before)
	}
	if diff := cmp.Diff(want, cut(n.allRules())); diff != "" {
		n.t.Errorf("rules afterwards (-want +got):\n%s", diff)
	}
}

var importedPattern = regexp.MustCompile(`(\d+) would (be imported|go on)`)

// dryRun checks that an agent with --dry-run counts the connections, and changes nothing.
func (n *node) dryRun(connections int, before string, args ...string) {
	n.t.Helper()
	out := n.cli(slices.Concat([]string{"agent", "--dry-run"}, args)...)
	most := 0
	for _, m := range importedPattern.FindAllStringSubmatch(out, -1) {
		count, err := strconv.Atoi(m[1])
		must(n.t, err)
		most = max(most, count)
	}
	if most < connections || !strings.Contains(out, "\nNothing was changed\n") {
		n.t.Errorf("dry run:\n%s", out)
	}
	if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(n.everything(), "\n")); diff != "" {
		n.t.Errorf("the dry run changed something (-before +after):\n%s", diff)
	}
}

// A node that another program masquerades is taken over under load, in either mode: no connection
// breaks, the rules that were named are gone, and no others.
func TestTakeOver(t *testing.T) {
	setsModes(t)
	for _, mode := range changes {
		t.Run(mode.mode, func(t *testing.T) {
			eachForeign(t, func(t *testing.T, n *node, f foreignSetup) {
				before, all := n.allRules(), n.everything()
				c := keepCompany(t, n, 200)
				for i, name := range f.names {
					if i > 0 {
						n.stop()
						all = n.everything()
					}
					n.dryRun(200/len(f.names), all, mode.option, podCIDRs, "--take-over", name)
					n.start(podCIDRs, mode.option, "--take-over", name)
					c.goesOn("taken over: " + name)
				}
				n.await("nothing draining", func(st agent.Status) bool {
					return st.Agent.Ready && st.Draining == nil && st.Masquerading.Mode == mode.mode
				})
				c.goesOn("when nothing drains")
				n.masqueraded(n.tapWorld())
				st := n.await("no warning of other rules", func(st agent.Status) bool {
					return !slices.ContainsFunc(st.Warnings, func(w string) bool { return strings.Contains(w, "another masquerade rule") })
				})
				if len(st.Warnings) > 0 {
					t.Logf("warnings: %q", st.Warnings)
				}
				if left := ofMode(n.everything(), mode.old); len(left) > 0 {
					t.Errorf("left of %s mode:\n%s", mode.old, strings.Join(left, "\n"))
				}
				// The option may stay.
				n.restart()
				c.goesOn("after a restart")
				if text := "nothing is left to be taken over"; !strings.Contains(n.log.String(), text) {
					t.Errorf("the log does not say %q", text)
				}
				if out := n.cli("agent", mode.option, podCIDRs, "--take-over", f.names[0], "--dry-run"); !strings.HasPrefix(out, "Nothing is left to be taken over") {
					t.Errorf("dry run afterwards:\n%s", out)
				}
				c.check()
				n.stop()
				n.cli("cleanup")
				n.wantGone(before, f)
			})
		})
	}
}

// An agent that runs beside another program's rules takes them over at a restart, which may change the mode too.
func TestTakeOverLater(t *testing.T) {
	setsModes(t)
	for _, from := range changes {
		for _, to := range changes {
			t.Run(from.mode+" to "+to.mode, func(t *testing.T) {
				t.Parallel()
				n := newNode(t, lab.Options{Pods: 2})
				n.env = append(n.env, n.lockFile())
				f := foreignSetups()[0]
				f.install(n)
				before := n.allRules()
				old := keepCompany(t, n, 40)
				n.start(podCIDRs, from.option)
				k := converse(t, n.Pods[0], 40, server(t, lab.EchoTCP, n.World, anyPort(n.WorldAddr.V4)), server(t, lab.EchoTCP, n.World, anyPort(n.WorldAddr.V6)))
				old.goesOn("with an agent")
				n.restart(to.option, "--take-over=IP-MASQ-AGENT")
				old.goesOn("taken over")
				k.goesOn(t, "taken over")
				n.awaitNothingOf(to.old)
				k.goesOn(t, "when nothing drains")
				old.check()
				n.stop()
				n.cli("cleanup")
				n.wantGone(before, f)
			})
		}
	}
}

// The agent may die at any moment of a take-over.
func TestTakeOverKilled(t *testing.T) {
	inEachBackend(t, lab.Options{Pods: 2}, func(t *testing.T, n *node, backend string) {
		f := foreignSetups()[2*slices.Index(ruleBackends, backend)]
		f.install(n)
		before := n.allRules()
		c := keepCompany(t, n, 60)
		for _, step := range []string{"programs are there", "ports of netfilter", "programs have new", "programs know", "mode changed"} {
			since := n.log.Len()
			n.launch(podCIDRs, "--log-level=debug", "--take-over=IP-MASQ-AGENT")
			n.killAt(since, step)
			c.goesOn("killed at " + step)
		}
		n.start(n.agent.args...)
		n.awaitNothingOf(agent.ModeIPTables)
		c.check()
		n.stop()
		n.cli("cleanup")
		n.wantGone(before, f)
	})
}

// In eBPF mode these capabilities are enough: those of the drop-in of the unit.
func TestTakeOverPrivileges(t *testing.T) {
	inEachBackend(t, lab.Options{}, func(t *testing.T, n *node, backend string) {
		f := foreignSetups()[2*slices.Index(ruleBackends, backend)]
		f.install(n)
		before := n.allRules()
		conn, _ := n.talk(0, server(t, lab.EchoTCP, n.World, anyPort(n.WorldAddr.V4)), 40001)
		wrapper, bin := filepath.Join(n.dir, "agent"), n.bin
		must(t, os.WriteFile(wrapper, fmt.Appendf(nil, "#!/bin/sh\nexec %s --bounding-set=-all,+bpf,+net_admin,+perfmon,+net_raw %s \"$@\"\n", labtest.Tool(t, "setpriv"), bin), 0o700))
		n.bin = wrapper
		n.start(podCIDRs, "--take-over=IP-MASQ-AGENT")
		n.bin = bin
		n.awaitNothingOf(agent.ModeIPTables)
		n.awaitOK()
		if !answers(conn) {
			t.Error("the connection does not answer")
		}
		n.wantGone(before, f)
	})
}

// What can't be taken over is refused, with what could be named, and nothing is changed.
func TestTakeOverRefused(t *testing.T) {
	inEachBackend(t, lab.Options{}, func(t *testing.T, n *node, backend string) {
		foreignSetups()[2*slices.Index(ruleBackends, backend)].install(n)
		before := n.everything()
		fine := "hint: this masquerades the source ranges, and can be named so: IPv4, table nat, chain IP-MASQ-AGENT: -m comment "
		for _, mode := range changes {
			for _, c := range []struct {
				name  string
				texts []string
			}{
				{"true", []string{"take-over: true names no chain", fine}},
				{"IP-MASQ", []string{"take-over: ", "no such rule or chain", fine}},
				{"DOCKER", []string{"chain DOCKER has no rule MASQUERADE or SNAT", fine}},
				{"-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE", []string{"it masquerades none of the source ranges", fine}},
				{"-A DOCKER -i docker0 -j RETURN", []string{"its target is RETURN", fine}},
			} {
				for _, dry := range [][]string{nil, {"--dry-run"}} {
					wantError(t, n.try(append([]string{"agent", mode.option, podCIDRs, "--allow-private-bpffs", "--take-over", c.name}, dry...)...), 1, c.texts...)
				}
			}
			wantError(t, n.try("agent", mode.option, podCIDRs, "--dry-run"), 2, "--dry-run is for --take-over", "hint: bauta status")
		}
		if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(n.everything(), "\n")); diff != "" {
			t.Errorf("a refused agent changed something (-before +after):\n%s", diff)
		}
	})
}

// A connection with an address that we would not give drains, and the status says so; nothing is
// taken from under it.
func TestTakeOverDrains(t *testing.T) {
	inEachBackend(t, lab.Options{}, func(t *testing.T, n *node, backend string) {
		second := netip.MustParseAddr("192.0.2.99")
		must(t, n.Node.AddAddr("eth0", netip.PrefixFrom(second, 32)))
		rule := "-A POSTROUTING -s 10.0.1.0/24 -o eth0 -j SNAT --to-source " + second.String()
		n.restore(backend, rule+"\n", "")
		before := n.allRules()
		wire := n.watchWire()
		echo := server(t, lab.EchoTCP, n.World, anyPort(n.WorldAddr.V4))
		conn, seen := n.talk(0, echo, 40001)
		if seen.Addr() != second {
			t.Fatalf("seen as %s", seen)
		}
		if out := n.cli("agent", podCIDRs, "--take-over", rule, "--dry-run"); !strings.Contains(out, "  0 would be imported\n  1 would drain") {
			t.Errorf("dry run:\n%s", out)
		}
		n.start(podCIDRs, "--take-over", rule)
		draining := func() {
			t.Helper()
			n.await("a connection that drains", func(st agent.Status) bool { return st.Draining != nil && st.Draining.Connections == 1 })
			if out := n.try("status").stdout; !strings.Contains(out, "draining 1 ") {
				t.Error(out)
			}
			if !answers(conn) {
				t.Error("the connection does not answer")
			}
		}
		draining()
		n.tapWorld().want(n.WorldAddr.V4, n.NodeAddr.V4)
		n.kill()
		if !answers(conn) {
			t.Error("the connection does not answer without the agent")
		}
		// The next agent does not know the rule any more.
		n.start(n.agent.args...)
		if !answers(conn) {
			t.Error("the connection does not answer after a crash")
		}
		conn.SetLinger(0)
		conn.Close()
		n.tables("conntrack", "-D", "-p", "tcp")
		n.awaitNothingOf(agent.ModeIPTables)
		wire.check(t)
		n.stop()
		n.cli("cleanup")
		n.wantGone(before, foreignSetup{kind: "rule", gone: "SNAT"})
	})
}
