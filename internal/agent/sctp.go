package agent

import (
	"context"

	"golang.org/x/sys/unix"
)

// stuckSCTP counts associations of the programs that netfilter knows nothing of, when rules are in
// force. Without the verification tags, which only the handshake tells, none can be made known
// to it: it takes their packets for invalid ones, which the rules drop. To let them pass would need rules
// that outlive what translates them, if the agent ends.
func (s *modeSwitch) stuckSCTP(ctx context.Context) (stuck int, err error) {
	flows, known, err := s.both(ctx)
	if err != nil {
		return 0, err
	}
	for _, f := range flows {
		if _, ok := known[keyOf(f)]; !ok && f.Proto == unix.IPPROTO_SCTP {
			stuck++
		}
	}
	return stuck, nil
}
