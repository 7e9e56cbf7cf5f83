package devices

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// maxLookups bounds Leave: each takes some 10 µs.
const maxLookups = 1 << 14

// Leave asks the kernel by which device packets to each destination leave, in the calling
// thread's network namespace. One to which there is no route is not in the result, nor
// are those beyond a bound. Rules that route by source or mark are not asked.
func Leave(destinations []netip.Addr) (map[netip.Addr]int, error) {
	out := make(map[netip.Addr]int, min(len(destinations), maxLookups))
	if len(destinations) == 0 {
		return out, nil
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("look up routes: %w", err)
	}
	defer h.Close()
	for i, dst := range destinations {
		if i == maxLookups {
			break
		}
		routes, err := h.RouteGet(dst.AsSlice())
		if err == nil && len(routes) > 0 { // else: unreachable, prohibited, of a family without routes ...
			out[dst] = routes[0].LinkIndex
		}
	}
	return out, nil
}
