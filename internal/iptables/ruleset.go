package iptables

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Names that are ours begin so.
const (
	chainPrefix = "BAUTA-"
	setPrefix   = "bauta-"
)

// Chains. Those of nat and of mangle have the same names where they ask the same.
const (
	hookChain        = "POSTROUTING"
	entryChain       = "BAUTA-POSTROUTING" // by device
	sourceChain      = "BAUTA-SOURCE"      // lines 2 and 3 of the contract
	destinationChain = "BAUTA-DESTINATION" // lines 4 to 8
	guardChain       = "BAUTA-GUARD"       // mangle: what must not leave
	stateChain       = "BAUTA-STATE"       // mangle: the same without unknown protocols
	addressChain     = "BAUTA-ADDRESS"     // by route
	deviceChain      = "BAUTA-DEVICE"      // the address of the device
	snatChain        = "BAUTA-SNAT-"       // and a number: translation to one address
)

const jump = "-j " + entryChain

// Ruleset is everything that a family needs in the kernel.
type Ruleset struct {
	Family Family
	Sets   []Set
	Tables []Table // in the order in which they are written
}

// Table is what we have in one table.
type Table struct {
	Name   string
	Chains []Chain
}

// Chain is a chain of ours; a rule is what stands behind "-A CHAIN ".
type Chain struct {
	Name  string
	Rules []string
}

// Set is a set of prefixes that rules name.
type Set struct {
	Name     string
	Prefixes []netip.Prefix // sorted, each once, none of length 0
}

// String is the text that would make it, for people and goldens: what `ipset
// restore` and `iptables-restore --noflush` read.
func (r Ruleset) String() string {
	var b strings.Builder
	for _, s := range r.Sets {
		fmt.Fprintf(&b, "create %s hash:net family %s\n", s.Name, map[Family]string{IPv4: "inet", IPv6: "inet6"}[r.Family])
		for _, p := range s.Prefixes {
			fmt.Fprintf(&b, "add %s %s\n", s.Name, p)
		}
	}
	for _, t := range r.Tables {
		b.WriteString(t.script(tableState{}))
	}
	return b.String()
}

func (t *Table) add(chain string, rules ...string) {
	i := slices.IndexFunc(t.Chains, func(c Chain) bool { return c.Name == chain })
	if i < 0 {
		i = len(t.Chains)
		t.Chains = append(t.Chains, Chain{Name: chain})
	}
	t.Chains[i].Rules = append(t.Chains[i].Rules, rules...)
}

// rule joins the parts of a rule, of which some may be empty.
func rule(parts ...string) string {
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), " ")
}

// script is the text for iptables-restore that turns what is there into t. It is
// empty where nothing is different.
func (t Table) script(now tableState) string {
	var head, body, tail []string
	wanted := make(map[string]bool)
	for _, c := range t.Chains {
		wanted[c.Name] = true
		if rules, ok := now.chains[c.Name]; ok && slices.Equal(rules, c.Rules) {
			continue
		}
		head = append(head, ":"+c.Name+" - [0:0]") // empties it if it is there
		for _, r := range c.Rules {
			body = append(body, "-A "+c.Name+" "+r)
		}
	}
	for _, name := range now.names() {
		if !wanted[name] {
			head = append(head, ":"+name+" - [0:0]")
			tail = append(tail, "-X "+name)
		}
	}
	if !now.jumpIsRight(wanted[entryChain]) {
		if len(now.at) == 0 { // else see unhook
			for _, r := range now.refs {
				body = append(body, "-D "+r)
			}
		}
		if wanted[entryChain] {
			body = append(body, "-I "+hookChain+" 1 "+jump)
		}
	}
	if len(head)+len(body) == 0 {
		return ""
	}
	lines := slices.Concat([]string{"*" + t.Name}, head, body, tail, []string{"COMMIT", ""})
	return strings.Join(lines, "\n")
}
