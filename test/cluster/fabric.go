package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/test/cluster/talk"
)

// EchoPort is the port of the outside's TCP and UDP servers; HTTP has the next one.
const EchoPort = 7000

// knowsPods is the outside's routing table for packets from its second addresses.
const knowsPods = 100

// Fabric is the network between the nodes, and the outside.
type Fabric struct {
	NS *lab.NS
	// Wire has seen what reached the outside, not what nodes told each other.
	Wire *lab.Capture

	leaks   *lab.Counter
	servers []func() error
}

func newFabric() (*Fabric, error) {
	ns, err := lab.NewNS("")
	if err != nil {
		return nil, err
	}
	f := &Fabric{NS: ns}
	if err := f.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("fabric: %w", err), f.Close())
	}
	return f, nil
}

func (f *Fabric) build() error {
	if err := f.NS.AddBridge("br0"); err != nil {
		return err
	}
	for _, p := range onLink(Gateway) {
		if err := f.NS.AddAddr("br0", p); err != nil {
			return err
		}
	}
	for _, outside := range []lab.Pair{World, Friend, Private} {
		for _, p := range hosts(outside) {
			if err := f.NS.AddAddr("lo", p); err != nil {
				return err
			}
		}
		for _, a := range outside.All() {
			if err := f.serve(a); err != nil {
				return err
			}
		}
	}
	for _, friend := range []lab.Pair{Friend, Private} {
		for _, p := range hosts(friend) {
			if err := f.NS.AddRule(p, knowsPods); err != nil {
				return err
			}
		}
	}
	for _, kv := range [][2]string{
		{"net.ipv4.ip_forward", "1"}, {"net.ipv6.conf.all.forwarding", "1"},
		{"net.ipv4.conf.all.send_redirects", "0"}, {"net.ipv4.conf.default.send_redirects", "0"},
		{"net.ipv4.conf.br0.send_redirects", "0"},
	} {
		if err := f.NS.Sysctl(kv[0], kv[1]); err != nil {
			return err
		}
	}
	var err error
	if f.Wire, err = lab.StartCapture(f.NS, "br0", lab.CaptureOptions{SnapLen: 128, Incoming: true}); err != nil {
		return err
	}
	f.leaks = f.Wire.Count(leak)
	return nil
}

// leak is a packet of a pod that the outside was not meant to see.
func leak(p lab.Packet) bool {
	frame, ok := lab.ParseFrame(p.Data)
	if !ok || !PodRange4.Contains(frame.Src) && !PodRange6.Contains(frame.Src) {
		return false
	}
	for _, a := range append(Friend.All(), Private.All()...) {
		if frame.Dst == a {
			return false
		}
	}
	return true
}

// Leaks returns how many packets with a pod's source address reached the outside,
// but those to the addresses that know pods. It is an error if some were not seen.
func (f *Fabric) Leaks() (int, error) {
	n := f.leaks.N()
	if lost := f.Wire.Lost(); lost > 0 {
		return n, fmt.Errorf("capture of the outside: %d packets lost", lost)
	}
	return n, nil
}

// Leaked describes the leaks that the capture still remembers.
func (f *Fabric) Leaked() []string {
	var list []string
	for _, p := range f.Wire.Packets() {
		if leak(p) {
			frame, _ := lab.ParseFrame(p.Data)
			list = append(list, frame.String())
		}
	}
	return list
}

// serve starts the outside's servers on an address.
func (f *Fabric) serve(a netip.Addr) error {
	tcp, err := lab.ListenTCP(f.NS, netip.AddrPortFrom(a, EchoPort))
	if err != nil {
		return err
	}
	f.servers = append(f.servers, tcp.Close)
	udp, err := lab.ListenUDP(f.NS, netip.AddrPortFrom(a, EchoPort))
	if err != nil {
		return err
	}
	f.servers = append(f.servers, udp.Close)
	web, err := lab.ListenTCP(f.NS, netip.AddrPortFrom(a, EchoPort+1))
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: talk.Handler("outside")}
	f.servers = append(f.servers, srv.Close)
	go talk.ServeTCP(tcp, "outside")
	go talk.ServeUDP(udp, "outside")
	go srv.Serve(web) // it ends with Close
	return nil
}

// Dial connects from the outside.
func (f *Fabric) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return dialFrom(f.NS)(ctx, network, address)
}

// dialFrom returns a dialer inside a namespace.
func dialFrom(ns *lab.NS) talk.Dial {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		to, err := netip.ParseAddrPort(address)
		if err != nil {
			return nil, err
		}
		if network == "udp" {
			return lab.DialUDP(ctx, ns, netip.AddrPort{}, to)
		}
		return lab.DialTCP(ctx, ns, netip.AddrPort{}, to)
	}
}

// attach connects a namespace to the bridge, with an eth0 and a default route.
func (f *Fabric) attach(ns *lab.NS, addr lab.Pair) error {
	number := addr.V4.As4()[3]
	port := fmt.Sprintf("p%d", number)
	// A machine has the address of its network card also after a reboot.
	card := net.HardwareAddr{2, 0, 0, 0, 0, number}
	if err := lab.Link(f.NS, port, ns, "eth0", lab.LinkOpts{AddrsB: onLink(addr), MACB: card}); err != nil {
		return err
	}
	if err := f.NS.AddPort("br0", port); err != nil {
		return err
	}
	return errors.Join(
		ns.AddRoute(lab.Route{Dst: lab.DefaultRoute4, Via: Gateway.V4}),
		ns.AddRoute(lab.Route{Dst: lab.DefaultRoute6, Via: Gateway.V6}))
}

// learn gives the addresses that know pods the way to those of a node.
func (f *Fabric) learn(n *Node) error {
	for _, p := range n.Pods {
		if err := f.NS.AddRoute(lab.Route{Dst: p, Via: n.Addr.Of(p.Addr()), Table: knowsPods}); err != nil {
			return err
		}
	}
	return nil
}

// Cut takes the link of a node or, with the address of the control plane, the API
// server off the network, or puts it back.
func (f *Fabric) Cut(addr lab.Pair, off bool) error {
	port := fmt.Sprintf("p%d", addr.V4.As4()[3])
	if off {
		return f.NS.SetDown(port)
	}
	return f.NS.SetUp(port)
}

// Close ends the servers and removes the namespace.
func (f *Fabric) Close() error {
	var errs []error
	for _, closeServer := range f.servers {
		if err := closeServer(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	f.servers = nil
	if f.Wire != nil {
		f.Wire.Stop()
	}
	return errors.Join(append(errs, f.NS.Close())...)
}
