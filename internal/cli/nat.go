package cli

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/datapath"
)

// natEntry is a line of bpf nat list, flat as scripts like it.
type natEntry struct {
	Proto          string `json:"proto"`
	Dir            string `json:"dir"` // OUT or IN
	Src            string `json:"src"`
	SrcPort        uint16 `json:"srcPort"`
	Dst            string `json:"dst"`
	DstPort        uint16 `json:"dstPort"`
	Xlate          string `json:"xlate"`
	XlatePort      uint16 `json:"xlatePort"`
	CreatedSeconds int64  `json:"createdSeconds"`
	State          string `json:"state"`
	Packets        uint64 `json:"packets"`
	Bytes          uint64 `json:"bytes"`
	Kind           string `json:"kind,omitempty"` // inbound or host; empty: a mapping
}

func (a *app) newNATList() *cobra.Command {
	var f *format
	var filter natFilter
	var all bool
	c := list("List the mappings of masqueraded flows",
		`List the mappings of masqueraded flows, a line for each direction. With ICMP the
identifier stands as the port; protocols without ports have port 0.

In iptables mode they are netfilter's connections from the source ranges. It knows
their age and counts their packets only if the sysctls nf_conntrack_timestamp and
nf_conntrack_acct in net.netfilter are 1; without them these are 0.`,
		`  bauta bpf nat list
  bauta bpf nat list --pod 10.0.1.99 --proto udp
  bauta bpf nat list --remote 1.1.1.1:443 -o json
  bauta bpf nat list --remote [2001:db8::1]:443`,
		func(ctx context.Context) error {
			return a.inspect(ctx, func(in agent.Reader) error {
				var mappings []datapath.Mapping
				for _, one := range filter.filters(all) {
					found, err := in.Mappings(one)
					if err != nil {
						return err
					}
					mappings = append(mappings, found...)
				}
				sortMappings(mappings)
				if *f == text {
					return showList(a, *f, mappings, mappingText)
				}
				return showList(a, *f, natEntries(mappings), nil)
			})
		})
	filter.register(c)
	c.Flags().BoolVar(&all, "all", false, "also connections opened from outside, and flows of the node itself")
	f = outputFlag(c)
	return c
}

func (a *app) newNATFlush() *cobra.Command {
	var filter natFilter
	c := &cobra.Command{
		Use:   "flush",
		Short: "Remove mappings",
		Long: `Remove the mappings of masqueraded flows, all or those that the filters select.
What they translated goes on with a new mapping if its next packet may begin one,
such as a datagram or the data of a TCP connection; the remote end of a connection
that gets another port or address by that resets it.`,
		Example: `  bauta bpf nat flush --pod 10.0.1.99
  bauta bpf nat flush --proto udp --remote 10.96.0.10:53
  bauta bpf nat flush`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := a.requireRoot(c, "try sudo "+c.CommandPath()); err != nil {
				return err
			}
			return a.inspect(c.Context(), func(in agent.Reader) error {
				flushed := 0
				for _, one := range filter.filters(false) {
					n, err := in.Flush(one)
					if err != nil {
						return err
					}
					flushed += n
				}
				return a.printf("Flushed %s\n", plural(flushed, "mapping"))
			})
		},
	}
	filter.register(c)
	return c
}

// sortMappings puts each flow's two lines together, leaving first, and the flows
// in the order of protocol, inner socket and remote socket.
func sortMappings(mappings []datapath.Mapping) {
	slices.SortFunc(mappings, func(a, b datapath.Mapping) int {
		innerA, remoteA, outerA := sockets(a)
		innerB, remoteB, outerB := sockets(b)
		// Step by step: of millions of mappings most differ in the first ones.
		c := cmp.Compare(a.Proto, b.Proto)
		if c == 0 {
			c = innerA.Compare(innerB)
		}
		if c == 0 {
			c = remoteA.Compare(remoteB)
		}
		if c != 0 {
			return c
		}
		return cmp.Or(outerA.Compare(outerB), cmp.Compare(a.Kind, b.Kind), cmp.Compare(rank(a), rank(b)))
	})
}

// sockets are the three ends of a flow, whichever direction m is. A connection
// opened from outside is not translated: its outer socket is none.
func sockets(m datapath.Mapping) (inner, remote, outer netip.AddrPort) {
	switch {
	case m.Out:
		return m.Src, m.Dst, m.Xlate
	case m.Xlate.IsValid():
		return m.Xlate, m.Src, m.Dst
	}
	return m.Dst, m.Src, m.Xlate
}

func rank(m datapath.Mapping) int {
	if m.Out {
		return 0
	}
	return 1
}

func direction(m datapath.Mapping) (dir, xlate string) {
	if m.Out {
		return "OUT", "XLATE_SRC"
	}
	return "IN", "XLATE_DST"
}

func mappingText(mappings []datapath.Mapping) string {
	var b strings.Builder
	var line []byte
	for _, m := range mappings {
		dir, xlate := direction(m)
		line = append(line[:0], protoName(m.Proto)+" "+dir+" "...)
		line = append(m.Src.AppendTo(line), " -> "...)
		line = m.Dst.AppendTo(line)
		if m.Xlate.IsValid() {
			line = m.Xlate.AppendTo(append(line, " "+xlate+" "...))
		}
		line = strconv.AppendInt(append(line, " Created="...), int64(m.Age/time.Second), 10)
		line = append(line, "sec ago State="+m.State...)
		if m.Kind != datapath.KindMapping {
			line = append(line, " Kind="+m.Kind...)
		}
		b.Write(append(line, '\n'))
	}
	return b.String()
}

func natEntries(mappings []datapath.Mapping) []natEntry {
	entries := make([]natEntry, len(mappings))
	for i, m := range mappings {
		dir, _ := direction(m)
		e := natEntry{
			Proto: protoName(m.Proto), Dir: dir,
			Src: m.Src.Addr().String(), SrcPort: m.Src.Port(),
			Dst: m.Dst.Addr().String(), DstPort: m.Dst.Port(),
			CreatedSeconds: int64(m.Age / time.Second), State: m.State,
			Packets: uint64(m.Packets), Bytes: m.Bytes,
		}
		if m.Xlate.IsValid() {
			e.Xlate, e.XlatePort = m.Xlate.Addr().String(), m.Xlate.Port()
		}
		if m.Kind != datapath.KindMapping {
			e.Kind = string(m.Kind)
		}
		entries[i] = e
	}
	return entries
}
