package datapath

import "fmt"

// PortSearches is what searches for external ports came to, since the tables were made.
type PortSearches struct {
	// Attempts[i] searches found a port with at most 2^i candidates, the last one
	// with more.
	Attempts   []uint64 `json:"attempts"`
	Failures   uint64   `json:"failures"`   // searches without a port
	Remembered uint64   `json:"remembered"` // refused without a search, because one had just failed
	Uncounted  uint64   `json:"uncounted"`  // new flows of addresses beyond those that quotas can count
	Answered   uint64   `json:"answered"`   // ICMP errors that told pods of a refusal
	Unanswered uint64   `json:"unanswered"` // refusals without one
}

// PortSearches reads how the searches for ports went.
func (i *Inspector) PortSearches() (PortSearches, error) {
	var all [masqStatSTATS]uint64
	if i.old {
		return PortSearches{}, nil
	}
	for n := range all {
		var perCPU []uint64
		if err := i.maps[pinStats].Lookup(uint32(n), &perCPU); err != nil {
			return PortSearches{}, fmt.Errorf("read statistics: %w", err)
		}
		for _, v := range perCPU {
			all[n] += v
		}
	}
	return PortSearches{
		Attempts: all[masqStatSTAT_TRIES:masqStatSTAT_FAILED], Failures: all[masqStatSTAT_FAILED],
		Remembered: all[masqStatSTAT_REMEMBERED], Uncounted: all[masqStatSTAT_UNCOUNTED],
		Answered: all[masqStatSTAT_ANSWERED], Unanswered: all[masqStatSTAT_UNANSWERED],
	}, nil
}
