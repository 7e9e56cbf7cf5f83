package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/conntrack"
	"bauta.dev/bauta/internal/datapath"
)

// someFlows are what netfilter may have on a node with pods.
func someFlows(now time.Time) []conntrack.Flow {
	ap := netip.MustParseAddrPort
	return []conntrack.Flow{
		{Proto: 6, Src: ap("10.1.0.2:34520"), Dst: ap("1.1.1.1:80"), Xlate: ap("192.0.2.1:34520"), SNAT: true, State: conntrack.Established,
			Created: now.Add(-123 * time.Second), Packets: [2]uint64{7, 5}, Bytes: [2]uint64{700, 500}},
		// A service: the remote is the endpoint.
		{Proto: 17, Src: ap("10.1.0.3:5353"), Dst: ap("10.96.0.10:53"), Remote: ap("9.9.9.9:53"), Xlate: ap("192.0.2.1:40000"), SNAT: true, DNAT: true, State: conntrack.TwoWay},
		{Proto: 1, Src: ap("10.1.0.2:77"), Dst: ap("1.1.1.1:0"), Xlate: ap("192.0.2.1:77"), SNAT: true, State: conntrack.Query},
		{Proto: 6, Src: ap("10.1.0.2:1"), Dst: ap("10.2.0.1:80"), Xlate: ap("10.1.0.2:1"), State: conntrack.Established}, // excluded
		{Proto: 6, Src: ap("172.17.0.2:1"), Dst: ap("1.1.1.1:80"), Xlate: ap("192.0.2.1:1"), SNAT: true, State: conntrack.Established},
		{Proto: 6, Src: ap("7.7.7.7:999"), Dst: ap("192.0.2.1:30080"), Remote: ap("10.1.0.2:8080"), Xlate: ap("7.7.7.7:999"), DNAT: true, State: conntrack.Syn},
		{Proto: 6, Src: ap("192.0.2.1:50000"), Dst: ap("1.1.1.1:443"), Xlate: ap("192.0.2.1:50000"), State: conntrack.Established},
		{Proto: 6, Src: ap("192.0.2.1:50001"), Dst: ap("192.0.2.1:22"), Xlate: ap("192.0.2.1:50001"), State: conntrack.Established}, // to itself
	}
}

func mappingTexts(list []datapath.Mapping) string {
	var lines []string
	for _, m := range list {
		dir := "IN"
		if m.Out {
			dir = "OUT"
		}
		lines = append(lines, fmt.Sprintf("%s %d %s %s -> %s as %s %s %s %d/%d", m.Kind, m.Proto, dir, m.Src, m.Dst, m.Xlate, m.Age, m.State, m.Packets, m.Bytes))
	}
	return strings.Join(lines, "\n")
}

func TestFlowList(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	var ended []conntrack.Flow
	l := flowLists{
		list:    func(context.Context, conntrack.Filter) ([]conntrack.Flow, error) { return someFlows(now), nil },
		end:     func(_ context.Context, f []conntrack.Flow) (int, error) { ended = f; return len(f), nil },
		now:     func() time.Time { return now },
		sources: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")},
		host:    []netip.Addr{netip.MustParseAddr("192.0.2.1")},
	}
	const tcp = `
		mapping 6 OUT 10.1.0.2:34520 -> 1.1.1.1:80 as 192.0.2.1:34520 2m3s established 7/700
		mapping 6 IN 1.1.1.1:80 -> 192.0.2.1:34520 as 10.1.0.2:34520 2m3s established 5/500`
	const udp = `
		mapping 17 OUT 10.1.0.3:5353 -> 9.9.9.9:53 as 192.0.2.1:40000 0s two-way 0/0
		mapping 17 IN 9.9.9.9:53 -> 192.0.2.1:40000 as 10.1.0.3:5353 0s two-way 0/0`
	const icmp = `
		mapping 1 OUT 10.1.0.2:77 -> 1.1.1.1:0 as 192.0.2.1:77 0s query 0/0
		mapping 1 IN 1.1.1.1:0 -> 192.0.2.1:77 as 10.1.0.2:77 0s query 0/0`
	const rest = `
		inbound 6 IN 7.7.7.7:999 -> 10.1.0.2:8080 as 10.1.0.2:8080 0s syn 0/0
		host 6 OUT 192.0.2.1:50000 -> 1.1.1.1:443 as 192.0.2.1:50000 0s established 0/0
		host 6 IN 1.1.1.1:443 -> 192.0.2.1:50000 as 192.0.2.1:50000 0s established 0/0`
	for _, c := range []struct {
		by   datapath.Filter
		want string
	}{
		{datapath.Filter{}, tcp + udp + icmp},
		{datapath.Filter{All: true}, tcp + udp + icmp + rest},
		{datapath.Filter{Pod: netip.MustParseAddr("10.1.0.3")}, udp},
		{datapath.Filter{Remote: netip.MustParseAddr("9.9.9.9"), Port: 53}, udp},
		{datapath.Filter{Remote: netip.MustParseAddr("1.1.1.1")}, tcp + icmp},
		{datapath.Filter{Remote: netip.MustParseAddr("1.1.1.1"), Port: 81}, ""},
		{datapath.Filter{Proto: 1}, icmp},
		{datapath.Filter{All: true, Remote: netip.MustParseAddr("7.7.7.7")}, rest[:strings.Index(rest, "\n\t\thost")]},
	} {
		got, err := l.Mappings(c.by)
		if err != nil {
			t.Fatal(err)
		}
		check(t, mappingTexts(got), c.want)
	}

	// Flush takes mappings only, whatever the filter.
	n, err := l.Flush(datapath.Filter{All: true, Pod: netip.MustParseAddr("10.1.0.2")})
	if err != nil || n != 2 || !slices.ContainsFunc(ended, func(f conntrack.Flow) bool { return f.Proto == 1 }) {
		t.Errorf("flushed %d %v: %v", n, err, ended)
	}
	// Without policy.json what is translated counts as ours.
	l.sources, l.host = nil, nil
	if got, err := l.Mappings(datapath.Filter{All: true}); err != nil || len(got) != 8 {
		t.Errorf("without source ranges: %v\n%s", err, mappingTexts(got))
	}
}
