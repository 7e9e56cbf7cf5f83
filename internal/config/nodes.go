package config

import (
	"bufio"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"bauta.dev/bauta/internal/policy"
)

// ParseNodes reads a nodes-file: a line each ADDRESS [NODE [TYPE]], # begins a
// comment. One bad line rejects the whole file, so that a slip never shortens
// the list. Errors name path, line and value.
func ParseNodes(r io.Reader, path string) ([]policy.NodeAddr, error) {
	var nodes []policy.NodeAddr
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		text := lines.Text()
		if n == 1 {
			text = strings.TrimPrefix(text, "\uFEFF")
		}
		text, _, _ = strings.Cut(text, "#")
		fields := strings.Fields(text)
		if len(fields) == 0 {
			continue
		}
		node, err := parseNode(fields)
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", path, n, err)
		}
		node.Origin = "file " + path
		if !slices.Contains(nodes, node) {
			nodes = append(nodes, node)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return nodes, nil
}

func parseNode(fields []string) (policy.NodeAddr, error) {
	node := policy.NodeAddr{Type: policy.InternalIP}
	if len(fields) > 3 {
		return node, fmt.Errorf("%q: more than ADDRESS [NODE [TYPE]]", strings.Join(fields, " "))
	}
	var problem string
	if node.Addr, problem = parseAddr(fields[0]); problem != "" {
		return node, fmt.Errorf("%q: %s", fields[0], problem)
	}
	if len(fields) > 1 {
		node.Node = fields[1]
	}
	if len(fields) > 2 {
		node.Type = policy.NodeType(fields[2])
		switch node.Type {
		case policy.InternalIP, policy.ExternalIP, policy.Hostname:
		default:
			return node, fmt.Errorf("%q: not a type (InternalIP, ExternalIP or Hostname)", fields[2])
		}
	}
	return node, nil
}

// parseAddr reads a node's address; problem is empty if it could.
func parseAddr(text string) (a netip.Addr, problem string) {
	a, err := netip.ParseAddr(text)
	switch {
	case err != nil:
		return a, "not an IP address"
	case a.Is4In6():
		return a, "an IPv4-mapped IPv6 address (write " + a.Unmap().String() + ")"
	case a.Zone() != "":
		return a, "has a zone (link-local addresses are never masqueraded towards)"
	case a.IsUnspecified() || a.IsMulticast():
		return a, "not the address of a node"
	}
	return a, ""
}

func setNodeAddresses(c *Config, s setting) error {
	for _, item := range s.split() {
		a, problem := parseAddr(item)
		if problem != "" {
			return s.refuseItem(item, problem, "write plain addresses, for example 192.0.2.10,2001:db8::10; nodes-file takes names and types")
		}
		node := policy.NodeAddr{Addr: a, Type: policy.InternalIP, Origin: "option node-addresses"}
		if !slices.Contains(c.NodeAddresses, node) {
			c.NodeAddresses = append(c.NodeAddresses, node)
		}
	}
	return nil
}
