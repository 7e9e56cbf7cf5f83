package iptables

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
)

// A table of the nft backend with a native rule that iptables can't show is not listed at
// all by iptables-save. What concerns us in it can be seen chain by chain.

// states reads what iptables-save printed, and tables that it could not show.
func (p program) states(ctx context.Context, out string) (map[string]tableState, error) {
	states := parseSave(out)
	for _, name := range tableNames {
		if !strings.Contains(out, "# Table `"+name+"' is incompatible") {
			continue
		}
		s, err := p.readHidden(ctx, name)
		if err != nil {
			family := map[Family]string{IPv4: "ip", IPv6: "ip6"}[p.family]
			return nil, advice.New(fmt.Errorf("table %s: %w: %w", name, errHidden, err), "a program added native nft rules to this table of iptables, "+
				"`nft list table "+family+" "+name+"` shows them: it should have a table of its own")
		}
		states[name] = s
	}
	return states, nil
}

// readHidden lists our chains one by one, and looks for jumps by netlink. Only jumps of
// POSTROUTING are seen.
func (p program) readHidden(ctx context.Context, table string) (s tableState, err error) {
	s.chains = make(map[string][]string)
	names, err := chainNames(p.family, table)
	if err != nil {
		return s, err
	}
	for _, name := range names {
		out, err := p.opts.run(ctx, strings.TrimSuffix(p.save, "-save"), "", "-t", table, "-S", name)
		if err != nil && !strings.Contains(err.Error(), "is incompatible") {
			return s, err
		}
		s.chains[name] = nil // also of one that holds such a rule: it is not as we wrote it
		for line := range strings.Lines(out) {
			if rule, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "-A "+name+" "); ok {
				s.chains[name] = append(s.chains[name], rule)
			}
		}
	}
	targets, handles, err := jumps(p.family, table, hookChain)
	for i, target := range targets {
		if target != entryChain {
			continue
		}
		if i == 0 {
			s.first = jump
		}
		s.refs = append(s.refs, hookChain+" "+jump)
		s.at = append(s.at, handles[i])
	}
	return s, err
}

// change writes a script that makes tables of what is there.
func (p program) change(ctx context.Context, script string, tables []Table, now map[string]tableState) error {
	if err := p.unhook(tables, now, false); err != nil {
		return err
	}
	if err := p.write(ctx, script); err != nil {
		return err
	}
	return p.unhook(tables, now, true)
}

// unhook deletes the jumps of a table that iptables can't show: to find them by their words,
// it would have to read all rules, and a number may be another rule's by then. Wrong jumps
// go when the right one stands, and before chains that they would keep from going.
func (p program) unhook(tables []Table, now map[string]tableState, written bool) error {
	for _, t := range tables {
		wanted := slices.ContainsFunc(t.Chains, func(c Chain) bool { return c.Name == entryChain })
		if now[t.Name].jumpIsRight(wanted) || wanted != written {
			continue
		}
		for _, handle := range now[t.Name].at {
			del := nftMessage(unix.NFT_MSG_DELRULE, unix.NLM_F_REQUEST|unix.NLM_F_ACK, p.family)
			del.AddData(nl.NewRtAttr(unix.NFTA_RULE_TABLE, nl.ZeroTerminated(t.Name)))
			del.AddData(nl.NewRtAttr(unix.NFTA_RULE_CHAIN, nl.ZeroTerminated(hookChain)))
			del.AddData(nl.NewRtAttr(unix.NFTA_RULE_HANDLE, handle))
			if err := sendBatch(del); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("table %s: jump: %w", t.Name, err)
			}
		}
	}
	return nil
}

// nftDump asks for all objects of a kind.
func nftDump(ask, answer int, f Family, attrs ...*nl.RtAttr) ([][]byte, error) {
	req := nftMessage(ask, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, f)
	for _, a := range attrs {
		req.AddData(a)
	}
	return req.Execute(unix.NETLINK_NETFILTER, uint16(unix.NFNL_SUBSYS_NFTABLES<<8|answer))
}

// chainNames are our chains in a table.
func chainNames(f Family, table string) (names []string, err error) {
	msgs, err := nftDump(unix.NFT_MSG_GETCHAIN, unix.NFT_MSG_NEWCHAIN, f)
	for _, msg := range msgs {
		var in, name string
		for typ, b := range attributes(msg[4:]) {
			switch typ {
			case unix.NFTA_CHAIN_TABLE:
				in = nl.BytesToString(b)
			case unix.NFTA_CHAIN_NAME:
				name = nl.BytesToString(b)
			}
		}
		if in == table && strings.HasPrefix(name, chainPrefix) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, err
}

// jumps are, for each rule of a chain, the chain that it jumps to with every packet; empty
// for another rule. Handles name the rules.
func jumps(f Family, table, chain string) (targets []string, handles [][]byte, err error) {
	msgs, err := nftDump(unix.NFT_MSG_GETRULE, unix.NFT_MSG_NEWRULE, f,
		nl.NewRtAttr(unix.NFTA_RULE_TABLE, nl.ZeroTerminated(table)), nl.NewRtAttr(unix.NFTA_RULE_CHAIN, nl.ZeroTerminated(chain)))
	for _, msg := range msgs {
		targets = append(targets, jumpOf(attribute(msg[4:], unix.NFTA_RULE_EXPRESSIONS)))
		handles = append(handles, attribute(msg[4:], unix.NFTA_RULE_HANDLE))
	}
	return targets, handles, err
}

// jumpOf is the target of a rule that is nothing but a counter and a jump.
func jumpOf(expressions []byte) (target string) {
	for _, e := range attributes(expressions) {
		data := attribute(e, unix.NFTA_EXPR_DATA)
		switch nl.BytesToString(attribute(e, unix.NFTA_EXPR_NAME)) {
		case "counter":
		case "immediate":
			verdict := attribute(attribute(data, unix.NFTA_IMMEDIATE_DATA), unix.NFTA_DATA_VERDICT)
			code := attribute(verdict, unix.NFTA_VERDICT_CODE)
			if jumpCode := int32(unix.NFT_JUMP); len(code) != 4 || int32(binary.BigEndian.Uint32(code)) != jumpCode {
				return ""
			}
			target = nl.BytesToString(attribute(verdict, unix.NFTA_VERDICT_CHAIN))
		default:
			return ""
		}
	}
	return target
}

// attribute is the first of a type, without its header.
func attribute(b []byte, typ uint16) []byte {
	for t, value := range attributes(b) {
		if t == typ {
			return value
		}
	}
	return nil
}
