package lab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
)

// DialTCP connects from inside the namespace. An invalid local address, or a
// zero port of it, is chosen by the kernel.
func DialTCP(ctx context.Context, ns *NS, local, remote netip.AddrPort) (*net.TCPConn, error) {
	var d net.Dialer
	if local.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(local)
	}
	c, err := dial(ctx, ns, d, "tcp", remote)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// DialUDP makes a connected UDP socket inside the namespace: it hears only the
// remote address, and ICMP errors as ECONNREFUSED and the like.
func DialUDP(ctx context.Context, ns *NS, local, remote netip.AddrPort) (*net.UDPConn, error) {
	var d net.Dialer
	if local.IsValid() {
		d.LocalAddr = net.UDPAddrFromAddrPort(local)
	}
	c, err := dial(ctx, ns, d, "udp", remote)
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

// dial relies on net creating the socket of a literal address on the calling
// goroutine; only names are looked up, and raced, on others.
func dial(ctx context.Context, ns *NS, d net.Dialer, network string, remote netip.AddrPort) (c net.Conn, err error) {
	err = ns.Do(func() error {
		c, err = d.DialContext(ctx, network, remote.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s from %s: %w", network, ns, err)
	}
	return c, nil
}

// ListenTCP listens inside the namespace. Port 0 is chosen by the kernel.
func ListenTCP(ns *NS, local netip.AddrPort) (*net.TCPListener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // plain TCP on the wire
	var l net.Listener
	err := ns.Do(func() (err error) {
		l, err = lc.Listen(context.Background(), "tcp", local.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen in %s: %w", ns, err)
	}
	return l.(*net.TCPListener), nil
}

// ListenUDP makes an unconnected UDP socket inside the namespace.
func ListenUDP(ns *NS, local netip.AddrPort) (*net.UDPConn, error) {
	c, err := ListenPacket(ns, net.ListenConfig{}, "udp", local.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

// ListenPacket is net.ListenConfig.ListenPacket inside the namespace, for
// instance of the networks "ip4:icmp", "ip4:47" and "ip6:ipv6-icmp".
func ListenPacket(ns *NS, lc net.ListenConfig, network, address string) (c net.PacketConn, err error) {
	err = ns.Do(func() error {
		c, err = lc.ListenPacket(context.Background(), network, address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen in %s: %w", ns, err)
	}
	return c, nil
}
