package policytest

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"bauta.dev/bauta/internal/policy"
)

// Parse reads text in the form of cases.txt; name stands in errors.
func Parse(name, text string) ([]Group, error) {
	var (
		base   policy.Input
		groups []Group
		seen   map[string]bool // keywords that the present block has given
		in     *policy.Input
	)
	for i, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimSpace(line)
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		var err error
		switch {
		case line == "base":
			in, seen = &base, make(map[string]bool)
		case words[0] == "group":
			groups = append(groups, Group{Name: strings.TrimSpace(line[len("group"):]), Line: i + 1, Input: base})
			in, seen = &groups[len(groups)-1].Input, make(map[string]bool)
		case in == nil:
			err = fmt.Errorf("neither base nor group comes before %q", line)
		case strings.Contains(line, " -> "):
			var c Case
			if len(groups) == 0 {
				err = fmt.Errorf("a case in no group")
			} else if c, err = parseCase(line); err == nil {
				c.Line = i + 1
				g := &groups[len(groups)-1]
				g.Cases = append(g.Cases, c)
			}
		default:
			err = setInput(in, words[0], words[1:], !seen[words[0]])
			seen[words[0]] = true
		}
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", name, i+1, err)
		}
	}
	return groups, nil
}

// setInput applies one keyword. The first mention in a block replaces what the
// block inherits, the next ones add.
func setInput(in *policy.Input, key string, args []string, first bool) error {
	if slices.Equal(args, []string{"none"}) {
		args = nil
	}
	switch key {
	case "families":
		in.IPv4, in.IPv6 = slices.Contains(args, "ipv4"), slices.Contains(args, "ipv6")
		return nil
	case "remote-nodes":
		in.RemoteNodes = policy.RemoteNodes(strings.Join(args, " "))
		if len(args) == 0 {
			in.RemoteNodes = policy.RemoteNone
		}
		return nil
	case "unknown-protocols":
		in.UnknownProtocols = policy.UnknownProtocols(strings.Join(args, " "))
		return nil
	case "sources":
		return addRules(&in.Sources, key, args, first)
	case "native":
		return addRules(&in.Native, key, args, first)
	case "nonmasq":
		return addRules(&in.NonMasq, key, args, first)
	case "pods":
		return addRules(&in.Pods, key, args, first)
	case "hosts":
		return add(&in.HostAddrs, args, first, netip.ParseAddr)
	case "nodes":
		return add(&in.Nodes, args, first, parseNode)
	case "ports":
		return setPorts(in, args)
	case "device":
		return addOne(&in.Devices, args, first, parseDevice)
	case "route":
		return addOne(&in.RouteSources, args, first, parseRoute)
	}
	return fmt.Errorf("unknown keyword %q", key)
}

// add parses each argument into a fresh slice, so that blocks never share one.
func add[T any](list *[]T, args []string, first bool, parse func(string) (T, error)) error {
	var out []T
	if !first {
		out = append(out, *list...)
	}
	for _, arg := range args {
		v, err := parse(arg)
		if err != nil {
			return err
		}
		out = append(out, v)
	}
	*list = out
	return nil
}

// addOne is add for a keyword whose whole line describes one element.
func addOne[T any](list *[]T, args []string, first bool, parse func(string) (T, error)) error {
	if len(args) == 0 {
		*list = nil
		return nil
	}
	return add(list, []string{strings.Join(args, " ")}, first, parse)
}

func addRules(list *[]policy.Rule, key string, args []string, first bool) error {
	return add(list, args, first, func(s string) (policy.Rule, error) {
		p, err := netip.ParsePrefix(s)
		return policy.Rule{Prefix: p, Origin: "cases " + key}, err
	})
}

// parseNode reads ADDRESS or ADDRESS=TYPE.
func parseNode(s string) (policy.NodeAddr, error) {
	text, kind, ok := strings.Cut(s, "=")
	if !ok {
		kind = string(policy.InternalIP)
	}
	a, err := netip.ParseAddr(text)
	return policy.NodeAddr{Addr: a, Node: "other", Type: policy.NodeType(kind), Origin: "node other"}, err
}

// parseDevice reads NAME [IPV4] [IPV6] [broadcast ADDRESS...].
func parseDevice(s string) (policy.Device, error) {
	words := strings.Fields(s)
	index, ok := deviceIndex[words[0]]
	if !ok {
		return policy.Device{}, fmt.Errorf("device %q: only eth0 and eth1 exist", words[0])
	}
	d := policy.Device{Name: words[0], Index: index, Ethernet: true}
	broadcast := false
	for _, word := range words[1:] {
		if word == "broadcast" {
			broadcast = true
			continue
		}
		a, err := netip.ParseAddr(word)
		switch {
		case err != nil:
			return d, err
		case broadcast:
			d.Broadcasts = append(d.Broadcasts, a)
		case a.Is4():
			d.IPv4 = a
		default:
			d.IPv6 = a
		}
	}
	return d, nil
}

// parseRoute reads PREFIX src ADDRESS, or PREFIX for a route without a source.
func parseRoute(s string) (policy.RouteSource, error) {
	words := strings.Fields(s)
	p, err := netip.ParsePrefix(words[0])
	if err != nil || len(words) == 1 {
		return policy.RouteSource{Prefix: p}, err
	}
	if len(words) != 3 || words[1] != "src" {
		return policy.RouteSource{}, fmt.Errorf("route %q: want PREFIX [src ADDRESS]", s)
	}
	a, err := netip.ParseAddr(words[2])
	return policy.RouteSource{Prefix: p, Source: a}, err
}

func setPorts(in *policy.Input, args []string) error {
	in.Ports = nil
	for _, arg := range args {
		lo, hi, _ := strings.Cut(arg, "-")
		first, err := strconv.ParseUint(lo, 10, 16)
		if err != nil {
			return err
		}
		last, err := strconv.ParseUint(hi, 10, 16)
		if err != nil {
			return err
		}
		for n := first; n <= last; n++ {
			in.Ports = append(in.Ports, uint16(n))
		}
	}
	return nil
}
