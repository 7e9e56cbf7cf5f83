package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
)

// Tunnel is what the node itself exchanges with another host, without a socket
// that the programs could look up.
type Tunnel struct {
	Proto  uint8      // IP protocol number
	Remote netip.Addr // unspecified: any of its family
	Port   uint16     // UDP: where the remote receives; 0 for a protocol without ports
}

// tunnelRemotes is how many remotes of one protocol and family are told apart.
// With more, the protocol is the node's towards all of them: a mesh of IPsec
// has no place for pods in between.
const tunnelRemotes = 1024

// SetTunnels tells the programs what the tunnels of the node exchange. It writes
// only what differs from the last time.
func (d *Datapath) SetTunnels(list []Tunnel) error {
	list = mergeTunnels(list)
	if d.tunnels != nil && slices.Equal(list, d.tunnels) {
		return nil
	}
	wanted := make(map[masqTunnel]bool)
	for _, t := range list {
		wanted[masqTunnel{Remote: addrTo(t.Remote), Port: swapPort(t.Port), Proto: t.Proto}] = true
	}
	var key masqTunnel
	var value uint32
	var gone []masqTunnel
	it := d.objs.Tunnels.Iterate()
	for it.Next(&key, &value) {
		if !wanted[key] {
			gone = append(gone, key)
		}
		delete(wanted, key)
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read tunnels: %w", err)
	}
	for _, key := range gone {
		if err := d.objs.Tunnels.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove tunnel: %w", err)
		}
	}
	for key := range wanted {
		if err := d.objs.Tunnels.Put(key, uint32(0)); err != nil {
			return fmt.Errorf("write tunnel: %w", err)
		}
	}
	d.tunnels = list
	return nil
}

// mergeTunnels sorts the list and keeps it short.
func mergeTunnels(list []Tunnel) []Tunnel {
	type group struct {
		proto uint8
		port  uint16
		ipv4  bool
	}
	groupOf := func(t Tunnel) group { return group{t.Proto, t.Port, t.Remote.Is4()} }
	remotes := make(map[group]int)
	for _, t := range list {
		remotes[groupOf(t)]++
	}
	out := make([]Tunnel, len(list))
	for i, t := range list {
		if remotes[groupOf(t)] > tunnelRemotes {
			if t.Remote = netip.IPv6Unspecified(); groupOf(list[i]).ipv4 {
				t.Remote = netip.IPv4Unspecified()
			}
		}
		out[i] = t
	}
	slices.SortFunc(out, func(a, b Tunnel) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Port, b.Port), a.Remote.Compare(b.Remote))
	})
	return slices.Compact(out)
}
