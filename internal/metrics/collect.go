package metrics

import (
	"runtime"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"bauta.dev/bauta/internal/policy"
)

// Collector is a prometheus.Collector of one agent. It has no state: scrapes may overlap.
type Collector struct {
	read  func() (Reading, error)
	descs map[string]desc
}

type desc struct {
	*prometheus.Desc
	kind Kind
}

// New makes a collector that calls read for each scrape.
func New(read func() (Reading, error)) *Collector {
	c := &Collector{read: read, descs: make(map[string]desc)}
	for _, m := range table {
		c.descs[m.Name] = desc{prometheus.NewDesc(m.FullName(), m.Help, m.Labels, nil), m.Kind}
	}
	return c
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(out chan<- *prometheus.Desc) {
	for _, m := range table {
		out <- c.descs[m.Name].Desc
	}
}

// Collect implements prometheus.Collector. A reading that fails makes the scrape fail: half of the
// series would look as if the others had ended.
func (c *Collector) Collect(out chan<- prometheus.Metric) {
	r, err := c.read()
	if err != nil {
		out <- prometheus.NewInvalidMetric(c.descs["build_info"].Desc, err)
		return
	}
	s := scrape{descs: c.descs, out: out, seen: make(map[string]bool)}
	s.agent(r)
	s.devices(r.Devices)
	if r.Programs != nil {
		s.programs(*r.Programs)
	}
	if r.Walks != nil {
		s.walks(*r.Walks)
	}
	if n := r.Netfilter; n != nil {
		s.drops(n.Drops)
		s.put("conntrack_entries", float64(n.Entries))
		s.put("conntrack_entries_limit", float64(n.Maximum))
	}
	if r.EventsLost != nil {
		s.put("events_lost_total", float64(*r.EventsLost))
	}
}

// scrape writes the series of one reading.
type scrape struct {
	descs map[string]desc
	out   chan<- prometheus.Metric
	seen  map[string]bool // a second series of the same labels would spoil the scrape
}

// put writes a series. Names of devices are any bytes to Linux, but not to Prometheus.
func (s scrape) put(name string, value float64, labels ...string) {
	for i, l := range labels {
		labels[i] = strings.ToValidUTF8(l, "\uFFFD")
	}
	key := name + "\x00" + strings.Join(labels, "\x00")
	if s.seen[key] {
		return
	}
	s.seen[key] = true
	d := s.descs[name]
	m, err := prometheus.NewConstMetric(d.Desc, d.kind.valueType(), value, labels...)
	if err != nil {
		m = prometheus.NewInvalidMetric(d.Desc, err)
	}
	s.out <- m
}

func (s scrape) histogram(name string, count uint64, sum float64, buckets map[float64]uint64) {
	m, err := prometheus.NewConstHistogram(s.descs[name].Desc, count, sum, buckets)
	if err != nil {
		m = prometheus.NewInvalidMetric(s.descs[name].Desc, err)
	}
	s.out <- m
}

func (s scrape) agent(r Reading) {
	s.put("build_info", 1, r.Version, runtime.Version())
	s.put("mode_info", 1, r.Mode)
	s.put("ready", truth(r.Ready))
	s.put("config_valid", truth(r.ConfigValid))
	s.put("config_reloads_total", float64(r.Reloads.Accepted), "success")
	s.put("config_reloads_total", float64(r.Reloads.Rejected), "failure")
	s.put("config_last_success_timestamp_seconds", float64(r.Reloads.LastAccepted.UnixMilli())/1000)
	s.put("nonmasq_prefixes", float64(r.Prefixes))
	s.put("nodes", float64(r.Nodes))
}

func truth(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

func (s scrape) devices(list []Device) {
	for _, d := range list {
		for _, direction := range d.Directions {
			s.put("device_attached", truth(d.Attached), d.Name, direction, d.Hook)
		}
		if d.IPv4.IsValid() {
			s.put("masquerade_address_info", 1, d.Name, families[0], d.IPv4.String())
		}
		if d.IPv6.IsValid() {
			s.put("masquerade_address_info", 1, d.Name, families[1], d.IPv6.String())
		}
	}
}

var families = [2]string{"ipv4", "ipv6"}

func (s scrape) programs(p Programs) {
	drops := make(map[string]uint64)
	for _, o := range policy.Outcomes() {
		if o.Outcome.Verdict() == policy.Drop {
			drops[o.Name] = 0 // a counter that begins at its first packet hides that one from rate()
		}
	}
	for _, c := range p.Counts {
		direction, family, reason := "egress", families[0], c.Outcome.String()
		if c.Ingress {
			direction = "ingress"
		}
		if c.IPv6 {
			family = families[1]
		}
		s.put("packets_total", float64(c.Packets), direction, family, reason)
		s.put("bytes_total", float64(c.Bytes), direction, family, reason)
		if c.Outcome.Verdict() == policy.Drop {
			drops[reason] += c.Packets
		}
	}
	s.drops(drops)
	for i, limit := range p.Limits {
		s.put("nat_flows_limit", float64(limit.Limit), families[i])
		s.put("nat_inbound_flows_limit", float64(limit.InboundLimit), families[i])
	}
	s.attempts(p.Searches.Attempts)
	s.put("port_allocation_failures_total", float64(p.Searches.Failures), "exhausted")
	s.put("port_allocation_failures_total", float64(p.Searches.Remembered), "remembered")
	s.put("nat_gc_removed_total", float64(p.Reclaimed), "reclaimed")
	for device, packets := range p.Leaked {
		s.put("leaked_packets_total", float64(packets), device)
	}
	for _, pod := range p.Pods {
		s.put("pod_flows", float64(pod.Flows), pod.Addr.String())
		s.put("pod_refused_total", float64(pod.Refused), pod.Addr.String())
	}
}

func (s scrape) drops(byReason map[string]uint64) {
	for reason, packets := range byReason {
		s.put("drops_total", float64(packets), reason)
	}
}

// attempts has a bucket for each power of two; the last one is of what is beyond the others.
func (s scrape) attempts(searches []uint64) {
	if len(searches) == 0 {
		return // the tables are of the previous layout
	}
	buckets := make(map[float64]uint64)
	var count uint64
	var sum float64
	for i, n := range searches {
		bound := float64(uint64(1) << i)
		count += n
		sum += float64(n) * bound
		if i < len(searches)-1 {
			buckets[bound] = count
		}
	}
	s.histogram("port_allocation_attempts", count, sum, buckets)
}

// protoNames has every protocol that has ports or identifiers.
var protoNames = map[uint8]string{
	policy.ProtoTCP: "tcp", policy.ProtoUDP: "udp", policy.ProtoICMP: "icmp", policy.ProtoICMPv6: "icmp",
	policy.ProtoSCTP: "sctp", policy.ProtoUDPLite: "udplite",
}

// otherProto is the label of all other protocols: 250 series would be nobody's use.
const otherProto = "other"

func (s scrape) walks(w Walks) {
	for i, family := range families {
		flows := map[string]int{otherProto: 0}
		for _, name := range protoNames {
			flows[name] = 0
		}
		for proto, n := range w.Flows[i] {
			name, ok := protoNames[proto]
			if !ok {
				name = otherProto
			}
			flows[name] += n
		}
		for name, n := range flows {
			s.put("nat_flows", float64(n), family, name)
		}
		s.put("nat_inbound_flows", float64(w.Inbound[i]), family)
	}
	if w.Worst.Pool > 0 {
		s.put("port_use_ratio_max", float64(w.Worst.Used)/float64(w.Worst.Pool))
	}
	s.put("nat_gc_removed_total", float64(w.Expired), "expired")
	s.put("nat_gc_removed_total", float64(w.Vanished), "vanished")
	s.put("nat_gc_removed_total", float64(w.Orphans), "orphan")
	s.put("nat_gc_last_timestamp_seconds", float64(w.Last.UnixMilli())/1000)
	buckets := make(map[float64]uint64)
	for i, bound := range durationBounds {
		buckets[bound] = w.Durations.within[i]
	}
	s.histogram("nat_gc_duration_seconds", w.Durations.count, w.Durations.sum, buckets)
}
