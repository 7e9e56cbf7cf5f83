package iptables

import (
	"fmt"
	"slices"
	"strings"
)

// tableState is what a table of the kernel holds that concerns us.
type tableState struct {
	chains map[string][]string // ours, with their rules
	refs   []string            // "CHAIN RULE": rules in chains of others that lead to ours
	first  string              // the first rule of POSTROUTING
	rules  int                 // of others
	at     [][]byte            // handles of refs, if iptables can't find them: see readHidden

	dormant bool // no packet comes to it: see markDormant
}

func (s tableState) names() []string {
	names := make([]string, 0, len(s.chains))
	for name := range s.chains {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// jumpIsRight tells whether the only way to our chains is the first rule, or that
// there is none if none is wanted.
func (s tableState) jumpIsRight(wanted bool) bool {
	if !wanted {
		return len(s.refs) == 0
	}
	return s.first == jump && len(s.refs) == 1
}

// reached tells whether packets come to our chains, at whatever place among others' rules.
func (s tableState) reached() bool { return !s.dormant && slices.Contains(s.refs, hookChain+" "+jump) }

func (s tableState) empty() bool { return len(s.chains)+len(s.refs) == 0 }

// table returns the state as a wanted one: what a failed change is taken back to.
func (s tableState) table(name string) Table {
	t := Table{Name: name}
	for _, c := range s.names() {
		t.Chains = append(t.Chains, Chain{c, s.chains[c]})
	}
	return t
}

// parseSave reads what iptables-save prints: the tables by name.
func parseSave(out string) map[string]tableState {
	tables := make(map[string]tableState)
	var name string
	var s tableState
	for line := range strings.Lines(out) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case strings.HasPrefix(line, "*"):
			name, s = line[1:], tableState{chains: make(map[string][]string)}
		case strings.HasPrefix(line, ":"+chainPrefix):
			chain, _, _ := strings.Cut(line[1:], " ")
			if _, ok := s.chains[chain]; !ok {
				s.chains[chain] = nil
			}
		case strings.HasPrefix(line, "-A "):
			s.rule(line[len("-A "):])
		case line == "COMMIT":
			tables[name] = s
		}
	}
	return tables
}

func (s *tableState) rule(text string) {
	chain, rule, _ := strings.Cut(text, " ")
	if strings.HasPrefix(chain, chainPrefix) {
		s.chains[chain] = append(s.chains[chain], rule)
		return
	}
	if chain == hookChain && s.first == "" {
		s.first = rule
	}
	words := strings.Fields(quotedText.ReplaceAllString(rule, `""`)) // comments can hold anything
	if strings.HasPrefix(option(words, "-j"), chainPrefix) || strings.HasPrefix(option(words, "-g"), chainPrefix) {
		s.refs = append(s.refs, text)
		return
	}
	s.rules++
}

// difference says in a line what is not as wanted; empty: nothing.
func (t Table) difference(now tableState) string {
	wanted := make(map[string]bool)
	for _, c := range t.Chains {
		wanted[c.Name] = true
		rules, ok := now.chains[c.Name]
		switch {
		case !ok:
			return fmt.Sprintf("table %s: chain %s is gone", t.Name, c.Name)
		case !slices.Equal(rules, c.Rules):
			return fmt.Sprintf("table %s: chain %s was changed", t.Name, c.Name)
		}
	}
	for _, name := range now.names() {
		if !wanted[name] {
			return fmt.Sprintf("table %s: chain %s was added", t.Name, name)
		}
	}
	switch {
	case now.dormant && len(t.Chains) > 0:
		return fmt.Sprintf("table %s: dormant: no packet comes to its rules", t.Name)
	case now.jumpIsRight(wanted[entryChain]):
		return ""
	case !slices.Contains(now.refs, hookChain+" "+jump) && wanted[entryChain]:
		return fmt.Sprintf("table %s: %s does not lead to %s", t.Name, hookChain, entryChain)
	case now.first != jump && wanted[entryChain]:
		return fmt.Sprintf("table %s: a rule stands before ours in %s", t.Name, hookChain)
	}
	return fmt.Sprintf("table %s: another rule leads to our chains", t.Name)
}
