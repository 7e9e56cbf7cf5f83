package metrics

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"
)

// prefix of every name.
const prefix = "bauta_"

// Kind is the type of a metric, by the name that Prometheus has.
type Kind string

const (
	Counter   Kind = "counter"
	Gauge     Kind = "gauge"
	Histogram Kind = "histogram"
)

func (k Kind) valueType() prometheus.ValueType {
	if k == Counter {
		return prometheus.CounterValue
	}
	return prometheus.GaugeValue
}

// Where a metric is to be had.
type Where string

const (
	Anywhere     Where = "both modes"
	BPFOnly      Where = "eBPF mode"
	IPTablesOnly Where = "iptables mode"
)

// Lives says how long a counter counts.
type Lives string

const (
	InAgent  Lives = "agent"  // begins anew with it
	InKernel Lives = "kernel" // goes on when the agent restarts
)

// Metric documents one metric: HELP, TYPE and the page are made of it.
type Metric struct {
	Name    string
	Kind    Kind
	Labels  []string
	Where   Where
	Lives   Lives
	Help    string // one line, no full stop
	Note    string // for the page: what one has to know to use it; may be empty
	Example string // an alert, or a query where none makes sense; both for one node or many
}

var table = []Metric{
	{"build_info", Gauge, []string{"version", "goversion"}, Anywhere, InAgent,
		"the running program, always 1", "",
		`count(count by (version) (bauta_build_info)) > 1`},
	{"mode_info", Gauge, []string{"mode"}, Anywhere, InAgent,
		"how it masquerades, BPF or iptables, always 1", "",
		`bauta_mode_info{mode="iptables"} == 1`},
	{"ready", Gauge, nil, Anywhere, InAgent,
		"1 if /readyz says so, else 0", "`/readyz` and `bauta status` give the reasons.",
		`bauta_ready == 0`},
	{"config_valid", Gauge, nil, Anywhere, InAgent,
		"1 if every file is accepted as it is now, else 0: the last good state is in force", "`bauta status` names file, key and value.",
		`bauta_config_valid == 0`},
	{"config_reloads_total", Counter, []string{"result"}, Anywhere, InAgent,
		"files found with other contents than before, by result (success or failure)", "The first reading counts too.",
		`increase(bauta_config_reloads_total{result="failure"}[15m]) > 0`},
	{"config_last_success_timestamp_seconds", Gauge, nil, Anywhere, InAgent,
		"when a file was last accepted with other contents; without any, the start", "",
		`time() - bauta_config_last_success_timestamp_seconds < 300`},
	{"nonmasq_prefixes", Gauge, nil, Anywhere, InAgent,
		"prefixes of the ip-masq-agent list in force", "0 without ip-masq-agent.",
		`max(bauta_nonmasq_prefixes) != min(bauta_nonmasq_prefixes)`},
	{"nodes", Gauge, nil, Anywhere, InAgent,
		"other nodes of the cluster that are known", "",
		`delta(bauta_nodes[10m]) < -10`},
	{"device_attached", Gauge, []string{"device", "direction", "hook"}, Anywhere, InKernel,
		"1 if programs or rules are in their place on a masquerade device, 0 if they should be", "`hook` is `tcx`, `tc`, `iptables`, or `none` where there is nothing.",
		`bauta_device_attached == 0`},
	{"masquerade_address_info", Gauge, []string{"device", "family", "address"}, Anywhere, InAgent,
		"an address that pods masquerade with, always 1", "Addresses of the node only.",
		`count by (instance, device, family) (bauta_masquerade_address_info) > 1`},
	{"packets_total", Counter, []string{"direction", "family", "reason"}, BPFOnly, InKernel,
		"packets by what was decided of them", "Segments count as the packets that they become. Reasons: [outcomes](outcomes.md). A reason appears with its first packet.",
		`sum by (reason) (rate(bauta_packets_total{direction="egress"}[5m]))`},
	{"bytes_total", Counter, []string{"direction", "family", "reason"}, BPFOnly, InKernel,
		"bytes of those packets, from the IP header on", "Segments share the headers that they come with: they count once.",
		`sum(rate(bauta_bytes_total{direction="egress", reason=~"masq-.*"}[5m]))`},
	{"drops_total", Counter, []string{"reason"}, Anywhere, InKernel,
		"packets dropped, by reason", "Both directions and families. In eBPF mode every reason is there from the start; in iptables mode those that there are rules for, and they begin anew when rules are written.",
		`increase(bauta_drops_total{reason=~"drop-no-port|drop-no-address|drop-table-full|drop-map-error"}[10m]) > 0`},
	{"nat_flows", Gauge, []string{"family", "proto"}, BPFOnly, InAgent,
		"flows in the table, those of the node itself too, as the last walk met them", "`nat_gc_last_timestamp_seconds` says when that was: 5 to 35 seconds ago. Absent before the first walk. `proto` is `tcp`, `udp`, `icmp` (ICMPv6 too), `sctp`, `udplite` or `other`.",
		`sum by (instance, family) (bauta_nat_flows) / on (instance, family) bauta_nat_flows_limit > 0.8`},
	{"nat_flows_limit", Gauge, []string{"family"}, BPFOnly, InKernel,
		"flows that the table holds", "`bpf-nat-global-max`.",
		`bauta_nat_flows_limit < 65536`},
	{"nat_inbound_flows", Gauge, []string{"family"}, BPFOnly, InAgent,
		"connections opened from outside, as the last walk met them", "",
		`bauta_nat_inbound_flows / bauta_nat_inbound_flows_limit > 0.8`},
	{"nat_inbound_flows_limit", Gauge, []string{"family"}, BPFOnly, InKernel,
		"connections opened from outside that their table holds", "",
		`bauta_nat_inbound_flows_limit < 16384`},
	{"port_allocation_attempts", Histogram, nil, BPFOnly, InKernel,
		"candidates that a search for an external port tried until one was free", "The kernel keeps the buckets only: `_sum` is as if each search had tried as many as its bucket allows (2048 beyond 1024). Searches without a port are in `port_allocation_failures_total`.",
		`histogram_quantile(0.99, rate(bauta_port_allocation_attempts_bucket[5m])) > 64`},
	{"port_allocation_failures_total", Counter, []string{"reason"}, BPFOnly, InKernel,
		"new flows without an external port: exhausted, a search found none, or remembered, one had just failed", "",
		`rate(bauta_port_allocation_failures_total[5m]) > 0`},
	{"port_use_ratio_max", Gauge, nil, BPFOnly, InAgent,
		"share of the external ports taken towards the remote where most are, as the last walk met them", "`bauta status` names the remote.",
		`bauta_port_use_ratio_max > 0.8`},
	{"nat_gc_duration_seconds", Histogram, nil, BPFOnly, InAgent,
		"time of a walk through the flow tables, which expires and counts them", "",
		`histogram_quantile(0.99, rate(bauta_nat_gc_duration_seconds_bucket[30m])) > 10`},
	{"nat_gc_removed_total", Counter, []string{"reason"}, BPFOnly, InAgent,
		"entries removed: expired, vanished (the address has left the node), orphan (a half without the other), reclaimed (by the kernel, with no agent)", "`reclaimed` lives in the kernel.",
		`increase(bauta_nat_gc_removed_total{reason="vanished"}[5m]) > 0`},
	{"nat_gc_last_timestamp_seconds", Gauge, nil, BPFOnly, InAgent,
		"when the last walk through the flow tables ended", "",
		`time() - bauta_nat_gc_last_timestamp_seconds > 120`},
	{"leaked_packets_total", Counter, []string{"device"}, BPFOnly, InKernel,
		"packets that left with an address that should have been masqueraded, as the leak sentinel saw them", "Absent unless `leak-sentinel` is on.",
		`increase(bauta_leaked_packets_total[10m]) > 0`},
	{"conntrack_entries", Gauge, nil, IPTablesOnly, InKernel,
		"connections in netfilter's table, masqueraded or not", "",
		`bauta_conntrack_entries / bauta_conntrack_entries_limit > 0.9`},
	{"conntrack_entries_limit", Gauge, nil, IPTablesOnly, InKernel,
		"connections that netfilter's table holds", "`net.netfilter.nf_conntrack_max`.",
		`bauta_conntrack_entries_limit < 65536`},
	{"events_lost_total", Counter, nil, BPFOnly, InKernel,
		"events for observers that a full buffer lost", "Absent: this version makes no such events yet.",
		`rate(bauta_events_lost_total[5m]) > 0`},
	{"pod_flows", Gauge, []string{"address"}, BPFOnly, InKernel,
		"mappings of a source address", "Only the largest `metrics-per-pod` addresses; absent unless that is set. An address that is no longer among them has no series.",
		`topk(5, bauta_pod_flows)`},
	{"pod_refused_total", Counter, []string{"address"}, BPFOnly, InKernel,
		"new flows of a source address that were refused", "As `pod_flows`.",
		`increase(bauta_pod_refused_total[10m]) > 100`},
}

// Table returns every metric, in the order of the documentation.
func Table() []Metric { return slices.Clone(table) }

// FullName is what Prometheus sees.
func (m Metric) FullName() string { return prefix + m.Name }
