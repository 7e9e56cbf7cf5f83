package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/iptables"
	"bauta.dev/bauta/internal/policy"
)

// Question is a packet that nobody sends: the first of a connection, forwarded, or sent by
// the node if the source is an address of it.
type Question struct {
	Src, Dst netip.AddrPort // ICMP: the port of Src is the identifier and that of Dst is 0
	Proto    uint8          // TCP (a SYN), UDP, ICMP or ICMPv6 (an echo request)
	Device   string         // empty: the one by which it is routed
}

// Explanation is what would happen to a packet, and why. Its JSON form is that of
// `bauta explain -o json`.
type Explanation struct {
	Verdict string `json:"verdict"` // masquerade, pass or drop
	Reason  string `json:"reason"`  // name of the outcome; empty: netfilter has none
	Match   string `json:"match"`   // the prefix that decided; empty: none
	Source  string `json:"source"`  // where Match, or the decision, is configured; empty: nowhere, or not known
	Device  string `json:"device"`
	Address string `json:"address"` // with verdict masquerade
	Port    uint16 `json:"port"`    // or identifier; 0: none, or chosen when the packet comes
	// Notes are what else there is to know, for people.
	Notes []string `json:"notes,omitempty"`
}

// DeviceError says that a Question names a device that is not there.
type DeviceError struct {
	Name    string
	Devices []string // that masquerade
}

func (e *DeviceError) Error() string { return e.Name + ": no such device" }

// Explain asks the data plane in force what it would do with a packet, in the network
// namespace of the calling thread, with an agent or without. Nothing is changed by that. Empty
// arguments mean the default places.
func Explain(ctx context.Context, bpfRoot, runDir string, q Question) (Explanation, error) {
	bpfRoot, runDir = orDefault(bpfRoot, DefaultBPFRoot), orDefault(runDir, DefaultRunDir)
	k, err := inspectNode(ctx, bpfRoot, runDir)
	if err != nil {
		return Explanation{}, err
	}
	defer k.Close()
	x := explainer{q: q}
	if x.attached, err = k.Attachments(); err != nil {
		return Explanation{}, err
	}
	if err := x.findDevice(); err != nil {
		return Explanation{}, err
	}
	x.readPolicy(runDir)
	drains, err := x.askDraining(ctx, bpfRoot)
	switch k := k.(type) {
	case *datapath.Inspector:
		if !drains && err == nil {
			err = x.askPrograms(k)
		}
	case *ruleInspector:
		if !drains && err == nil {
			err = x.askRules(ctx, k)
		}
	}
	if err != nil {
		return Explanation{}, err
	}
	if err := x.noteIPsec(k); err != nil {
		return Explanation{}, err
	}
	x.noteForeign(ctx, k)
	return x.Explanation, nil
}

// explainer puts an Explanation together.
type explainer struct {
	Explanation
	q        Question
	index    int // of the device
	attached []datapath.Attachment
	file     *PolicyFile     // nil: not readable
	decision policy.Decision // by the policy in file
}

func (x *explainer) note(format string, args ...any) {
	x.Notes = append(x.Notes, fmt.Sprintf(format, args...))
}

// findDevice finds the device by which the packet leaves.
func (x *explainer) findDevice() error {
	if x.Device = x.q.Device; x.Device != "" {
		dev, err := net.InterfaceByName(x.Device)
		if err != nil {
			return &DeviceError{x.Device, x.masqueradeDevices()}
		}
		x.index = dev.Index
		return nil
	}
	var err error
	if x.index, err = devices.Egress(x.q.Src.Addr(), x.q.Dst.Addr()); err != nil {
		return err
	}
	dev, err := net.InterfaceByIndex(x.index)
	if err != nil {
		return fmt.Errorf("device %d: %w", x.index, err)
	}
	x.Device = dev.Name
	return nil
}

func (x *explainer) masqueradeDevices() []string {
	var names []string
	for _, a := range x.attached {
		if !a.Draining {
			names = append(names, a.Device)
		}
	}
	return names
}

// isAttached tells whether the data plane sees what leaves by the device.
func (x *explainer) isAttached() bool {
	return slices.ContainsFunc(x.attached, func(a datapath.Attachment) bool { return a.Index == x.index })
}

// readPolicy reads policy.json, and what it says about the packet.
func (x *explainer) readPolicy(runDir string) {
	file, err := ReadPolicyFile(runDir)
	var p *policy.Policy
	if err == nil {
		p, err = file.Policy()
	}
	if err != nil {
		x.note("where the policy comes from is not known: %v", err)
		return
	}
	x.file = &file
	x.decision = p.Decide(x.packet())
}

func (x *explainer) packet() policy.Packet {
	pkt := policy.Packet{Src: x.q.Src.Addr(), Dst: x.q.Dst.Addr(), Proto: x.q.Proto, Device: x.index}
	switch x.q.Proto {
	case policy.ProtoTCP:
		pkt.TCPFlags = policy.TCPSyn
	case policy.ProtoICMP:
		pkt.ICMPType = 8
	case policy.ProtoICMPv6:
		pkt.ICMPType = 128
	}
	return pkt
}

// conclude fills in an outcome of the kernel's, with the match and its origin by policy.json
// if that says the same. match finds the entry in the kernel.
func (x *explainer) conclude(o policy.Outcome, match func(policy.Outcome) (netip.Prefix, error)) error {
	x.Verdict, x.Reason = o.Verdict().String(), o.String()
	x.Match, x.Source = "", ""
	switch d := x.decision; {
	case x.file != nil && agrees(o, d.Outcome):
		x.Match, x.Source = prefixText(d.Match), origin(d.Origin)
		if o.Verdict() != policy.Pass {
			x.Match, x.Source = x.sourceRange()
		}
		return nil
	case x.file != nil && o == policy.MasqKnown:
		x.note("a known connection keeps its mapping; a new one would get %s", d.Outcome)
		return nil
	case x.file != nil:
		x.note("policy.json says %s: it is not what is in the kernel, which decides", d.Outcome)
	}
	p, err := match(o)
	x.Match = prefixText(p)
	return err
}

// agrees tells whether an outcome is what becomes of a decision: that knows neither the
// connections that run nor what there is room for.
func agrees(o, decided policy.Outcome) bool {
	switch o {
	case decided:
		return true
	case policy.MasqHost, policy.PassTranslated:
		return decided == policy.PassHost || decided == policy.MasqNew
	case policy.MasqKnown, policy.PassInbound, policy.PassHandover, policy.DropHandover, policy.DropNoPort, policy.DropTableFull,
		policy.DropQuota, policy.DropRate, policy.DropProtocol, policy.DropMapError, policy.DropRewrite:
		return decided == policy.MasqNew
	}
	return false
}

// origin is where a rule comes from, in the four forms of the contract. What the node has by
// itself, such as its addresses, is configured nowhere.
func origin(from string) string {
	if from == "default" {
		return from
	}
	for _, form := range []string{"option ", "file ", "node "} {
		if strings.HasPrefix(from, form) {
			return from
		}
	}
	return ""
}

// sourceRange is the masquerade source range that the packet is in.
func (x *explainer) sourceRange() (match, source string) {
	var longest policy.Rule
	for _, r := range x.file.Sources {
		if r.Prefix.Contains(x.q.Src.Addr()) && r.Prefix.Bits() > longest.Prefix.Bits() {
			longest = r
		}
	}
	return prefixText(longest.Prefix), origin(longest.Origin)
}

func prefixText(p netip.Prefix) string {
	if !p.IsValid() {
		return ""
	}
	return p.String()
}

// elsewhere concludes for a packet that leaves by a device without us: it passes, whatever the
// policy says of its addresses.
func (x *explainer) elsewhere() {
	x.Verdict, x.Reason = policy.Pass.String(), policy.PassDevice.String()
	if x.Device == "lo" && x.q.Device == "" {
		x.note("the destination is an address of this node")
	}
	list := x.masqueradeDevices()
	if len(list) == 0 { // which may be none of devices' doing
		x.note("no device masquerades now: `bauta status` says why")
		return
	}
	x.Source = "option devices"
	x.note("%s is no masquerade device; those are: %s", x.Device, strings.Join(list, ", "))
}

// noteIPsec says that a policy of IPsec is for the packet. The programs see what is encrypted
// only, the rules what is not yet.
func (x *explainer) noteIPsec(k inspector) error {
	if !x.isAttached() {
		return nil
	}
	encrypts, err := devices.Encrypts(x.q.Src.Addr(), x.q.Dst.Addr(), x.q.Proto)
	switch {
	case err != nil || !encrypts:
		return err
	case isFlowMeter(k):
		x.note("a policy of IPsec (xfrm) is for this packet: it is encrypted before the programs see it, and they judge what comes of it")
	case x.Verdict == policy.Masquerade.String():
		x.note("a policy of IPsec (xfrm) is for this packet, but it is translated before that")
	}
	return nil
}

// maxForeignNotes keeps the answer readable.
const maxForeignNotes = 3

// noteForeign names rules of others that may translate the packet. Without the privilege or
// the binaries to read them there is nothing to say.
func (x *explainer) noteForeign(ctx context.Context, k inspector) {
	if x.Verdict == policy.Drop.String() || !x.isAttached() {
		return
	}
	rules, err := iptables.Foreign(ctx, iptables.Options{}, []netip.Prefix{netip.PrefixFrom(x.q.Src.Addr(), x.q.Src.Addr().BitLen())})
	if err != nil {
		return
	}
	what := "a rule of another program may translate this packet too"
	if isFlowMeter(k) {
		what = "a rule of another program may translate this packet before the programs see it"
	}
	for _, r := range rules[:min(len(rules), maxForeignNotes)] {
		x.note("%s: %s", what, foreignText(r))
	}
	if n := len(rules) - maxForeignNotes; n > 0 {
		x.note("and %d more", n)
	}
}
