package devices

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// selectCase is one case of testdata/select.txt: a name after "== ", then lines
// that begin with
//
//	link INDEX NAME [KIND] [hw TYPE] [down] [slave] [loopback] [master INDEX]
//	addr DEVICE PREFIX [peer PREFIX] [brd ADDR] [scope link|host] [FLAG...]
//	route PREFIX|default|default6 [local|anycast] [via ADDR] dev DEVICE ... [src ADDR] [metric N] [table N] [tos N]
//	option devices|sources|attached VALUE..., option forwarded|route-source
//	> an expected line, as render writes it, or "> KIND none"
//
// FLAG is a field of Addr in lower case. Several "dev" make a multipath route.
type selectCase struct {
	name    string
	line    int
	host    Snapshot
	options Options
	want    map[string][]string // by kind of line
}

func parseCases(t *testing.T, text string) []*selectCase {
	t.Helper()
	var cases []*selectCase
	var c *selectCase
	for i, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		if name, ok := strings.CutPrefix(line, "== "); ok {
			c = &selectCase{name: strings.TrimSpace(name), line: i + 1, want: make(map[string][]string)}
			cases = append(cases, c)
			continue
		}
		if err := c.parse(words); err != nil {
			t.Fatalf("line %d: %s: %v", i+1, line, err)
		}
	}
	return cases
}

func (c *selectCase) parse(words []string) (err error) {
	defer func() { // MustParse and out of range: a mistake in the file
		if r := recover(); r != nil {
			err = fmt.Errorf("%v", r)
		}
	}()
	switch w := words[1:]; words[0] {
	case ">":
		c.want[w[0]] = append(c.want[w[0]], strings.Join(w, " "))
	case "option":
		return c.option(w)
	case "link":
		return c.link(w)
	case "addr":
		return c.addr(w)
	case "route":
		return c.route(w)
	default:
		return fmt.Errorf("unknown word %q", words[0])
	}
	return nil
}

func (c *selectCase) option(w []string) error {
	switch w[0] {
	case "devices":
		c.options.Patterns = w[1:]
	case "attached":
		c.options.Attached = w[1:]
	case "forwarded":
		c.options.Forwarded = true
	case "route-source":
		c.options.RouteSource = true
	case "sources":
		for _, s := range w[1:] {
			c.options.Sources = append(c.options.Sources, netip.MustParsePrefix(s))
		}
	default:
		return fmt.Errorf("unknown option %q", w[0])
	}
	return nil
}

func (c *selectCase) link(w []string) error {
	l := Link{Index: number(w[0]), Name: w[1], Kind: "device", Hardware: "ether", Flags: unix.IFF_UP}
	if l.Name == "-" {
		l.Name = ""
	}
	for w = w[2:]; len(w) > 0; w = w[1:] {
		switch w[0] {
		case "down":
			l.Flags &^= unix.IFF_UP
		case "slave":
			l.Flags |= unix.IFF_SLAVE
		case "loopback":
			l.Flags |= unix.IFF_LOOPBACK
			l.Hardware = "loopback"
		case "hw":
			l.Hardware, w = w[1], w[1:]
		case "master":
			l.Master, w = number(w[1]), w[1:]
		default:
			l.Kind = w[0]
		}
	}
	c.host.Links = append(c.host.Links, l)
	return nil
}

func (c *selectCase) addr(w []string) error {
	p := netip.MustParsePrefix(w[1])
	a := Addr{Index: c.index(w[0]), Addr: p.Addr(), Subnet: p.Masked()}
	if p.Addr().IsLinkLocalUnicast() && p.Addr().Is6() {
		a.Scope = unix.RT_SCOPE_LINK
	}
	for w = w[2:]; len(w) > 0; w = w[1:] {
		switch w[0] {
		case "peer":
			a.Subnet, w = netip.MustParsePrefix(w[1]).Masked(), w[1:]
		case "brd":
			a.Broadcast, w = netip.MustParseAddr(w[1]), w[1:]
		case "scope":
			a.Scope, w = map[string]int{"link": unix.RT_SCOPE_LINK, "host": unix.RT_SCOPE_HOST}[w[1]], w[1:]
		case "secondary":
			a.Secondary = true
		case "temporary":
			a.Temporary = true
		case "deprecated":
			a.Deprecated = true
		case "tentative":
			a.Tentative = true
		case "dadfailed":
			a.DADFailed = true
		default:
			return fmt.Errorf("unknown word %q", w[0])
		}
	}
	c.host.Addrs = append(c.host.Addrs, a)
	return nil
}

func (c *selectCase) route(w []string) error {
	r := Route{Table: unix.RT_TABLE_MAIN}
	switch w[0] {
	case "default":
		r.Dst = netip.MustParsePrefix("0.0.0.0/0")
	case "default6":
		r.Dst = netip.MustParsePrefix("::/0")
	default:
		r.Dst = netip.MustParsePrefix(w[0])
	}
	var via netip.Addr
	for w = w[1:]; len(w) > 0; w = w[1:] {
		switch w[0] {
		case "local":
			r.Type, r.Table = Local, unix.RT_TABLE_LOCAL
		case "anycast":
			r.Type, r.Table = Anycast, unix.RT_TABLE_LOCAL
		case "via":
			via, w = netip.MustParseAddr(w[1]), w[1:]
		case "dev":
			r.Hops = append(r.Hops, Hop{c.index(w[1]), via})
			via, w = netip.Addr{}, w[1:]
		case "src":
			r.Source, w = netip.MustParseAddr(w[1]), w[1:]
		case "metric":
			r.Metric, w = number(w[1]), w[1:]
		case "table":
			r.Table, w = number(w[1]), w[1:]
		case "tos":
			r.TOS, w = number(w[1]), w[1:]
		default:
			return fmt.Errorf("unknown word %q", w[0])
		}
	}
	c.host.Routes = append(c.host.Routes, r)
	return nil
}

func (c *selectCase) index(name string) int {
	i := slices.IndexFunc(c.host.Links, func(l Link) bool { return l.Name == name })
	return c.host.Links[i].Index
}

func number(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		panic(err)
	}
	return n
}
