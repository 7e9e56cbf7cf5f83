package policy

import "fmt"

// Outcome is the one reason a packet got its verdict. The numbers are shared
// with the data plane (bpf/outcome.h); a test compares the two. The verdict is
// a property of the number's range: passes, translations, holds, drops.
type Outcome uint8

const (
	// Continue is no outcome yet: the next stage decides.
	Continue Outcome = 0

	PassNotIP       Outcome = 1
	PassDisabled    Outcome = 2
	PassHost        Outcome = 3
	PassSource      Outcome = 4
	PassMulticast   Outcome = 5
	PassNative      Outcome = 6
	PassNonMasq     Outcome = 7
	PassPod         Outcome = 8
	PassNode        Outcome = 9
	PassInbound     Outcome = 10
	PassProtocol    Outcome = 11
	PassDevice      Outcome = 12
	PassNoMapping   Outcome = 13
	PassInboundFull Outcome = 14
	PassTranslated  Outcome = 15
	PassFragment    Outcome = 16
	PassHandover    Outcome = 17

	MasqNew      Outcome = 32
	MasqKnown    Outcome = 33
	MasqHost     Outcome = 34
	MasqError    Outcome = 35
	MasqFragment Outcome = 36

	HoldFragment Outcome = 60

	DropBadHeader Outcome = 64
	DropNoPort    Outcome = 65
	DropNoAddress Outcome = 66
	DropTableFull Outcome = 67
	DropQuota     Outcome = 68
	DropProtocol  Outcome = 69
	DropFragment  Outcome = 70
	DropStray     Outcome = 71
	DropExtension Outcome = 72
	DropMapError  Outcome = 73
	DropRewrite   Outcome = 74
	DropNoPolicy  Outcome = 75
	DropRate      Outcome = 76
	DropHandover  Outcome = 77

	// OutcomeSlots is the size of a table indexed by Outcome.
	OutcomeSlots = 96

	firstMasq = MasqNew
	firstHold = HoldFragment
	firstDrop = DropBadHeader
)

// Verdict is what happens to the packet.
type Verdict uint8

const (
	Pass Verdict = iota
	Masquerade
	Hold // until a packet comes that says more
	Drop
)

func (v Verdict) String() string {
	return [...]string{"pass", "masquerade", "hold", "drop"}[v]
}

// OutcomeInfo documents one outcome for users: tables, metrics and messages
// are generated from it.
type OutcomeInfo struct {
	Outcome Outcome
	Name    string
	Meaning string // one line, no full stop
	Remedy  string // what an operator can do; empty if nothing is wrong
}

// outcomes is ordered by number.
var outcomes = []OutcomeInfo{
	{PassNotIP, "pass-not-ip", "not an IPv4 or IPv6 packet", ""},
	{PassDisabled, "pass-disabled", "masquerading is off for this family", "set enable-ipv4-masquerade or enable-ipv6-masquerade"},
	{PassHost, "pass-host", "the source is an address of the node itself", ""},
	{PassSource, "pass-source", "the source is in no masquerade source range", "add the range to pod-cidrs, or set masquerade-forwarded; for global IPv6 sources then also enable-ipv6-masquerade"},
	{PassMulticast, "pass-multicast", "multicast, broadcast or IPv6 control traffic", ""},
	{PassNative, "pass-native", "the destination is in a native-routing CIDR", "change ipv4-native-routing-cidr or ipv6-native-routing-cidr"},
	{PassNonMasq, "pass-nonmasq", "the destination is in the ip-masq-agent list", "change nonMasqueradeCIDRs in the ip-masq-agent file"},
	{PassPod, "pass-pod", "the destination is in the pod range of another node", ""},
	{PassNode, "pass-node", "the destination is an address of another cluster node", "set remote-node-masquerade"},
	{PassInbound, "pass-inbound", "the connection was opened from outside", ""},
	{PassProtocol, "pass-protocol", "a protocol without ports, and unknown-protocols is pass", "set unknown-protocols to masquerade or drop"},
	{PassDevice, "pass-device", "the device is no masquerade device, or no longer one", "if it leads out of the node, add it to devices"},
	{PassNoMapping, "pass-no-mapping", "an arriving packet that belongs to no mapping", ""},
	{PassInboundFull, "pass-inbound-full", "opened from outside, but that table is full: replies will not be recognized", "raise bpf-nat-global-max, or filter unwanted traffic"},
	{PassTranslated, "pass-translated", "already translated: on a device stacked above this one, or an answer on its way inside", ""},
	{PassFragment, "pass-fragment", "a later fragment for the node came before its first and could not be held: left to the node", "more than 2048 bytes, or too many at a time"},
	{PassHandover, "pass-handover", "the masquerade mode is being changed: netfilter translates this answer back", ""},

	{MasqNew, "masq-new", "first packet of a masqueraded connection", ""},
	{MasqKnown, "masq-known", "packet of a known masqueraded connection", ""},
	{MasqHost, "masq-host", "the node's own packet met a live mapping and got another port", "keep ip_local_port_range and snat-port-range apart"},
	{MasqError, "masq-error", "ICMP error about a masqueraded connection", ""},
	{MasqFragment, "masq-fragment", "later fragment of a masqueraded datagram", ""},

	{HoldFragment, "hold-fragment", "a later fragment for the node came before its first: it arrives again behind that, and is counted again then", ""},

	{DropBadHeader, "drop-bad-header", "the IP or transport header cannot be read", "capture the packet; the sender is broken or hostile"},
	{DropNoPort, "drop-no-port", "no free external port towards this remote", "widen snat-port-range; see status for the worst remote"},
	{DropNoAddress, "drop-no-address", "the node has no address to masquerade with in this family", "give the device a global address"},
	{DropTableFull, "drop-table-full", "the flow table is full", "raise bpf-nat-global-max"},
	{DropQuota, "drop-quota", "the pod holds max-ports-per-pod mappings, or more than its share while others need theirs", "see what the pod does; raise max-ports-per-pod, widen snat-port-range, raise bpf-nat-global-max"},
	{DropProtocol, "drop-protocol", "this protocol cannot be masqueraded to this remote now", "one inner host per protocol and remote; see unknown-protocols"},
	{DropFragment, "drop-fragment", "fragment without its first fragment (arriving ones: 2 seconds after they were held), a first fragment too short, or one of SCTP whose port would have to change", "avoid fragmentation, or fix the path MTU"},
	{DropStray, "drop-stray", "RST, FIN, SYN+ACK, their like in SCTP, reply or error of an unknown connection", ""},
	{DropExtension, "drop-extension", "IPv6 extension header chain is too long or malformed", "capture the packet; more than 6 extension headers are not walked"},
	{DropMapError, "drop-map-error", "the kernel refused a table update", "look for memory pressure on the node"},
	{DropRewrite, "drop-rewrite", "the kernel refused to rewrite the packet", "look for memory pressure on the node"},
	{DropNoPolicy, "drop-no-policy", "the data plane has no policy", "restart the agent; report this as a bug"},
	{DropRate, "drop-rate", "the pod opens new connections faster than one pod may", "see what the pod does; raise max-new-flows-per-pod"},
	{DropHandover, "drop-handover", "the masquerade mode is being changed, and this connection just now: its next packet gets through", ""},
}

// Outcomes returns every outcome with its documentation, by number.
func Outcomes() []OutcomeInfo { return append([]OutcomeInfo(nil), outcomes...) }

// Info returns the documentation of o; an unknown number gets its number as name.
func (o Outcome) Info() OutcomeInfo {
	for _, i := range outcomes {
		if i.Outcome == o {
			return i
		}
	}
	return OutcomeInfo{Outcome: o, Name: fmt.Sprintf("outcome-%d", uint8(o))}
}

// String returns the reason name, for example "pass-native".
func (o Outcome) String() string {
	if o == Continue {
		return "continue"
	}
	return o.Info().Name
}

// Verdict says what an outcome does with the packet.
func (o Outcome) Verdict() Verdict {
	switch {
	case o < firstMasq:
		return Pass
	case o < firstHold:
		return Masquerade
	case o < firstDrop:
		return Hold
	}
	return Drop
}
