package devices

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
)

// Egress asks the kernel by which device a packet from src to dst leaves the network
// namespace of the calling thread. What is for the node itself goes by the loopback. First it
// asks as for a packet that came from where src is, for rules that route by source or by
// device; a node that does not forward, or does not take src from there, has no such route,
// and the one of its own packets is the answer. So it is for multicast and broadcast: the
// kernel says only that the node takes its share of them.
func Egress(src, dst netip.Addr) (index int, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return 0, fmt.Errorf("look up routes: %w", err)
	}
	defer h.Close()
	get := func(dst netip.Addr, opt netlink.RouteGetOptions) (netlink.Route, error) {
		routes, err := h.RouteGetWithOptions(dst.AsSlice(), &opt)
		if err == nil && len(routes) == 0 {
			err = unix.ENETUNREACH
		}
		if err != nil {
			return netlink.Route{}, err
		}
		return routes[0], nil
	}
	if from, err := get(src, netlink.RouteGetOptions{}); err == nil {
		opt := netlink.RouteGetOptions{SrcAddr: src.AsSlice()}
		if from.Type != unix.RTN_LOCAL {
			opt.IifIndex = from.LinkIndex
		}
		if r, err := get(dst, opt); err == nil && (r.LinkIndex != loopback || r.Type == unix.RTN_LOCAL) {
			return leavesBy(r), nil
		}
	}
	r, err := get(dst, netlink.RouteGetOptions{})
	switch {
	case errors.Is(err, unix.EPERM):
		return 0, fmt.Errorf("route to %s: %w", dst, err)
	case err != nil:
		return 0, advice.New(fmt.Errorf("route to %s: none (%w)", dst, err), "ip route get "+dst.String()+" shows what the kernel says", "--device names the device")
	}
	return leavesBy(r), nil
}

const loopback = 1 // in every network namespace

// leavesBy is the device of a route. That of an IPv6 address of the node names the device that
// has the address.
func leavesBy(r netlink.Route) int {
	if r.Type == unix.RTN_LOCAL {
		return loopback
	}
	return r.LinkIndex
}
