// Package metrics names what Prometheus reads of an agent, and says what each name means.
//
// A Collector turns a Reading, taken anew for each scrape, into series; an Exposition
// writes them. Neither keeps a count: whatever counts is in the kernel's maps and rules, or in
// the state that the agent publishes, and the status shows the same.
//
// Invariants: a scrape walks no flow table, so its cost is flat in the number of flows. No
// label has an address of a pod, unless the reading has pods, which somebody asked for.
package metrics

import (
	"net/netip"
	"time"

	"bauta.dev/bauta/internal/datapath"
)

// Reading is what one scrape shows.
type Reading struct {
	Version     string // of the program
	Mode        string // of masquerading, by the name that the status has
	Ready       bool   // what /readyz says
	ConfigValid bool
	Reloads     Reloads
	Prefixes    int // of the ip-masq-agent list
	Nodes       int // of the cluster that are known
	Devices     []Device

	Programs  *Programs  // nil in iptables mode, or before there is anything in the kernel
	Netfilter *Netfilter // nil in eBPF mode, or before there are rules
	Walks     *Walks     // nil in iptables mode, or before the first walk
	// EventsLost is how many events for observers a full buffer has lost; nil: nobody makes any.
	EventsLost *uint64
}

// Reloads counts how often a file had other contents than before.
type Reloads struct {
	Accepted, Rejected uint64
	LastAccepted       time.Time // or the start: options are read then
}

// Add counts one.
func (r *Reloads) Add(now time.Time, accepted bool) {
	if !accepted {
		r.Rejected++
		return
	}
	r.Accepted++
	r.LastAccepted = now
}

// Device is a device that masquerades, or should.
type Device struct {
	Name       string
	Hook       string   // "none" where nothing is attached
	Directions []string // that the hook sees
	Attached   bool
	IPv4, IPv6 netip.Addr
}

// Programs is what the maps of eBPF mode hold.
type Programs struct {
	Counts    []datapath.Count
	Limits    [2]datapath.Usage // IPv4, IPv6; only the limits
	Searches  datapath.PortSearches
	Reclaimed uint64            // entries that the kernel ended without an agent
	Leaked    map[string]uint64 // packets by device; nil: no sentinel watches
	Pods      []datapath.Pod    // the largest; none unless asked for
}

// Netfilter is what netfilter counts instead, in iptables mode.
type Netfilter struct {
	Drops            map[string]uint64 // packets by reason
	Entries, Maximum int               // connections of the network namespace
}

// Walks sums up the walks through the flow tables that an agent made. A new walk makes a
// new value: scrapes may hold the old one.
type Walks struct {
	Last                       time.Time // when the last one ended
	Flows                      [2]map[uint8]int
	Inbound                    [2]int
	Worst                      datapath.PortUse
	Expired, Vanished, Orphans uint64
	Durations                  Durations
}

// After returns the sum with one more walk. The zero Walks is before the first.
func (w Walks) After(s datapath.Swept, now time.Time) Walks {
	w.Last, w.Flows, w.Worst = now, s.Protos, s.Worst
	w.Inbound = [2]int{s.Usage[0].Inbound, s.Usage[1].Inbound}
	w.Expired += uint64(s.Expired)
	w.Vanished += uint64(s.Vanished)
	w.Orphans += uint64(s.Orphans)
	w.Durations.add(s.Took.Seconds())
	return w
}

// durationBounds are in seconds: a walk through an empty table takes a millisecond, one
// through a million flows some seconds.
var durationBounds = [...]float64{0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30}

// Durations is a histogram.
type Durations struct {
	within [len(durationBounds)]uint64 // cumulative
	count  uint64
	sum    float64
}

func (d *Durations) add(seconds float64) {
	d.count++
	d.sum += seconds
	for i, bound := range durationBounds {
		if seconds <= bound {
			d.within[i]++
		}
	}
}
