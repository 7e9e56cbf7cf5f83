package cli

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/policy"
)

// What a packet has that the command line does not say.
const (
	defaultSrcPort = 50000
	defaultDstPort = 443
)

func (a *app) newExplain() *cobra.Command {
	var f *format
	var src, dst endpointValue
	var device string
	proto := explainProto("tcp")
	c := &cobra.Command{
		Use:   "explain --src IP[:PORT] --dst IP[:PORT]",
		Short: "What would happen to a packet, and why",
		Long: `Say what would happen to a packet now: whether it would be masqueraded, by which
rule or prefix, where that is configured, and which address and port it would get.

In eBPF mode the real program runs, dry, with the tables in the kernel: nothing is
sent, made, refreshed or counted. In iptables mode the rules, sets and connections
in the kernel are followed. Either works with the agent down. The kernel has the
last word: where policy.json says something else, the text says so.

The packet is the first of a connection: a TCP SYN, a UDP datagram or an ICMP echo
request, whose identifier is the port of --src. Without --device it leaves by the
device that the routes give it. A packet with an address of the node is one of the
node's own, any other one is forwarded. A packet of a known connection keeps the
mapping of that (masq-known).

As JSON it has verdict (masquerade, pass or drop), reason, match, source, device,
address, port (0 if there is none, or nobody knows it yet), and notes for people if
there are any. The exit status is 0 whatever the verdict.`,
		Example: `  bauta explain --src 10.0.1.99 --dst 1.1.1.1
  bauta explain --src 10.0.1.99:34520 --dst 1.1.1.1:53 --proto udp
  bauta explain --src [fd00:10::2]:34520 --dst [2606:4700::1]:443 -o json
  bauta explain --src 10.0.1.99 --dst 1.1.1.1 --proto icmp --device eth1`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			q, err := explainQuestion(c, src, dst, proto)
			if err != nil {
				return err
			}
			q.Device = device
			e, err := agent.Explain(c.Context(), a.bpfRoot, a.runDir, q)
			if unknown, ok := errors.AsType[*agent.DeviceError](err); ok {
				return unknownDevice(c, unknown)
			}
			if err != nil {
				return err
			}
			return a.show(*f, e, func() string { return explainText(q, e) })
		},
	}
	c.Flags().Var(&src, "src", "`IP[:PORT]` that the packet comes from; the port is 50000 if it is not given")
	c.Flags().Var(&dst, "dst", "`IP[:PORT]` that it goes to; the port is 443 if it is not given")
	c.Flags().Var(&proto, "proto", "`protocol`: tcp, udp or icmp")
	c.Flags().StringVar(&device, "device", "", "`device` by which it leaves; by the routes if it is not given")
	_ = c.RegisterFlagCompletionFunc("proto", cobra.FixedCompletions([]string{"tcp", "udp", "icmp"}, cobra.ShellCompDirectiveNoFileComp))
	f = outputFlag(c)
	return c
}

// explainQuestion checks what flags are only right together.
func explainQuestion(c *cobra.Command, src, dst endpointValue, proto explainProto) (q agent.Question, err error) {
	usage := func(format string, args ...any) error {
		return &usageError{msg: c.CommandPath() + ": " + fmt.Sprintf(format, args...), hints: []string{c.CommandPath() + " --help shows how to call it"}}
	}
	for name, v := range map[string]endpointValue{"src": src, "dst": dst} {
		if !v.addr.IsValid() && (name == "src" || src.addr.IsValid()) {
			return q, usage("no --%s", name)
		}
	}
	is4 := src.addr.Is4()
	if is4 != dst.addr.Is4() {
		return q, usage("--src %s and --dst %s: not of one family", src.addr, dst.addr)
	}
	if !src.given {
		src.port = defaultSrcPort
	}
	if !dst.given {
		dst.port = defaultDstPort
	}
	switch {
	case proto == "icmp" && dst.given:
		return q, usage("--dst %s: ICMP has no ports; that of --src is the identifier", dst.String())
	case proto == "icmp":
		dst.port = 0
	case src.port == 0 || dst.port == 0:
		return q, usage("port 0: not one of a connection")
	}
	q.Src, q.Dst = netip.AddrPortFrom(src.addr, src.port), netip.AddrPortFrom(dst.addr, dst.port)
	q.Proto = map[explainProto]uint8{"tcp": policy.ProtoTCP, "udp": policy.ProtoUDP, "icmp": policy.ProtoICMP}[proto]
	if proto == "icmp" && !is4 {
		q.Proto = policy.ProtoICMPv6
	}
	return q, nil
}

func unknownDevice(c *cobra.Command, e *agent.DeviceError) error {
	u := &usageError{msg: fmt.Sprintf("%s: --device %s", c.CommandPath(), e)}
	for _, s := range suggest(e.Name, e.Devices) {
		u.hints = append(u.hints, fmt.Sprintf("did you mean %s?", s))
	}
	list := "there are no masquerade devices"
	if len(e.Devices) > 0 {
		list = "the masquerade devices are " + strings.Join(e.Devices, ", ")
	}
	u.hints = append(u.hints, list)
	return u
}

// explainText is the explanation for people: the verdict, then what there is to say of it.
func explainText(q agent.Question, e agent.Explanation) string {
	what := fmt.Sprintf("%s %s -> %s", strings.ToUpper(protoName(q.Proto)), q.Src, q.Dst)
	if q.Proto == policy.ProtoICMP || q.Proto == policy.ProtoICMPv6 {
		what = fmt.Sprintf("%s %s -> %s, identifier %d,", protoName(q.Proto), q.Src.Addr(), q.Dst.Addr(), q.Src.Port())
	}
	info := outcomeNamed(e.Reason)
	stays := e.Device == "lo"
	var first string
	switch {
	case e.Verdict == policy.Masquerade.String():
		to := e.Address
		if a, err := netip.ParseAddr(e.Address); err == nil && e.Port != 0 {
			to = netip.AddrPortFrom(a, e.Port).String()
		}
		first = fmt.Sprintf("masquerade: %s leaves by %s with the source %s", what, e.Device, to)
	case e.Verdict == policy.Drop.String():
		first = fmt.Sprintf("drop: %s is dropped at %s", what, e.Device)
	case stays:
		first = fmt.Sprintf("pass: %s is for this node itself and stays as it is", what)
	default:
		first = fmt.Sprintf("pass: %s leaves by %s as it is", what, e.Device)
	}
	var rows [][]string
	row := func(name, value string) {
		if value != "" {
			rows = append(rows, []string{name, value})
		}
	}
	row("Reason:", reasonText(info))
	if e.Match != "" {
		row("Match:", matchText(e))
	} else {
		row("Source:", e.Source)
	}
	row("Device:", e.Device)
	row("Address:", e.Address)
	if e.Port != 0 {
		row("Port:", strconv.Itoa(int(e.Port)))
	}
	if !stays && (e.Reason != policy.PassDevice.String() || e.Source != "") {
		row("Remedy:", info.Remedy)
	}
	for _, n := range e.Notes {
		row("Note:", n)
	}
	return first + "\n" + table(rows...)
}

func outcomeNamed(name string) policy.OutcomeInfo {
	for _, o := range policy.Outcomes() {
		if o.Name == name {
			return o
		}
	}
	return policy.OutcomeInfo{Name: name}
}

func reasonText(o policy.OutcomeInfo) string {
	if o.Meaning == "" {
		return o.Name
	}
	return o.Name + ": " + o.Meaning
}

// matchText is the prefix with its origin, if that is known.
func matchText(e agent.Explanation) string {
	if e.Source == "" {
		return e.Match
	}
	return e.Match + " (" + e.Source + ")"
}

// explainProto is a protocol of connections: tcp, udp or icmp, that of the family.
type explainProto string

func (v *explainProto) Type() string   { return "protocol" }
func (v *explainProto) String() string { return string(*v) }

func (v *explainProto) Set(s string) error {
	switch p := explainProto(strings.ToLower(s)); p {
	case "tcp", "udp", "icmp":
		*v = p
		return nil
	}
	return fmt.Errorf("%q: not one of tcp, udp, icmp", s)
}

// endpointValue is IP[:PORT].
type endpointValue struct {
	addr  netip.Addr
	port  uint16
	given bool // the port
}

func (v *endpointValue) Type() string { return "endpoint" }

func (v *endpointValue) String() string {
	switch {
	case !v.addr.IsValid():
		return ""
	case !v.given:
		return v.addr.String()
	}
	return netip.AddrPortFrom(v.addr, v.port).String()
}

func (v *endpointValue) Set(s string) error {
	addr, port := s, ""
	switch at := strings.LastIndex(s, ":"); {
	case strings.HasPrefix(s, "["):
		inner, rest, closed := strings.Cut(s[1:], "]")
		if addr = inner; !closed || rest != "" && !strings.HasPrefix(rest, ":") {
			return notEndpoint(s)
		}
		port, v.given = strings.TrimPrefix(rest, ":"), rest != ""
	case strings.Count(s, ":") == 1:
		addr, port, v.given = s[:at], s[at+1:], true
	}
	a, err := netip.ParseAddr(addr)
	switch {
	case err != nil:
		return notEndpoint(s)
	case a.Zone() != "":
		return fmt.Errorf("%q: an address with a zone; write %s and name the device with --device", s, a.WithZone(""))
	case a.Is4In6():
		return fmt.Errorf("%q: an IPv4-mapped address is in no packet; write %s", s, a.Unmap())
	case a.IsUnspecified():
		return fmt.Errorf("%q: not the address of a host", s)
	}
	v.addr, v.port = a, 0
	if !v.given {
		return nil
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return fmt.Errorf("%q: port %q is not a number from 0 to 65535", s, port)
	}
	v.port = uint16(n)
	return nil
}

func notEndpoint(s string) error {
	return fmt.Errorf("%q: not IP[:PORT] (IPv6 with a port is [ADDRESS]:PORT)", s)
}
