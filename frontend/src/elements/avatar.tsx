import { initials, pick } from "../format";
import { Icon } from "../icons";

/** Shows initials on a colour derived from the user's id. */
export function Avatar({
  name,
  id,
  assistant = false,
  small = false,
}: {
  name: string;
  id: string;
  assistant?: boolean;
  small?: boolean;
}) {
  const tint = assistant ? "spark" : `tint-${pick(id, 8)}`;
  return (
    <span class={`avatar ${tint} ${small ? "small" : ""}`} aria-hidden="true">
      {assistant ? <Icon name="spark" /> : initials(name)}
    </span>
  );
}
